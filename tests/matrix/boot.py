"""Boot kernels under QEMU with this package and its tests, and run some of them there.

    python tests/matrix/boot.py KERNEL... [--python VERSION] [--arm64] [--16k] [--timeout SECONDS] [--memory MIB]
        [--tests ARGUMENT...]

A KERNEL is a version of Debian's (6.12), which is fetched and kept, or an image (vmlinuz). No module is needed.
Everything is in an initial RAM disk: an interpreter, its packages, the repository. The interpreter is this one, or one
of Debian's (see `tests/debian_roots.py`). The kernel runs with TCG, so that this works on any machine that has
qemu-system-x86, or qemu-system-arm for arm64; it takes some minutes. By default the tests are those of test_smoke.py,
which hold on each kernel since 5.10. The last lines are rows for the table in docs/reference/kernel.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

sys.path.append(str(Path(__file__).parents[1]))
import debian_roots
from debian_packages import unpacked
from debian_roots import PURE as PACKAGES
from debian_roots import REPOSITORY, SUMMARY

if TYPE_CHECKING:
    from collections.abc import Iterator

GUEST = Path("/repository")
"""Where the repository is in the guest, whose /tmp is empty."""
PURE = Path("/pure")
"""Where packages of this machine are in a guest of another architecture."""
LEFT_OUT = {
    *(
        "test",
        "idlelib",
        "lib2to3",
        "tkinter",
        "ensurepip",
        "turtledemo",
        "config-3.11-x86_64-linux-gnu",
        "config-3.11-aarch64-linux-gnu",
        "site-packages",
    ),
    *("pip", "setuptools", "mypy", "mypyc", "matplotlib", "mpl_toolkits", "PIL", "pillow.libs", "fontTools", "libcst"),
    *(
        "textual",
        "kiwisolver",
        "ziglang",
        "obstore",
        "aiohttp",
        "ast_serialize",
        "contourpy",
        "ruff",
        "memray",
        "mutmut",
    ),
}
"""Folders of the standard library and of site-packages that no test of a kernel needs."""
SMOKE = ["tests/matrix/test_smoke.py"]
INIT = """#!{python}
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None)
for kind, place in (
    *(("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp"), ("tmpfs", "/dev/shm")),
):
    os.makedirs(place, exist_ok=True)
    libc.mount(kind.encode(), place.encode(), kind.encode(), 0, None)
os.environ.update(PYTHONPATH={path!r}, HOME="/tmp", PATH="/usr/bin:/bin", PYTHONDONTWRITEBYTECODE="1",
    AIOUFFD_TEST_DEADLINE="1800", PYTEST_ADDOPTS="--color=no")
os.chdir({repository!r})
here = os.uname()
print("\\nMATRIX", here.release, here.machine, os.sysconf("SC_PAGE_SIZE"), sys.version.split()[0], flush=True)
code = subprocess.call([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "timeout=1900", *{arguments!r}])
print("MATRIX exit", code, flush=True)
libc.sync()
libc.reboot(0x4321FEDC)
"""


def files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that the guest needs."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith(".")]
        for name in names:
            if not name.endswith((".a", ".mo", ".exe")) and "mypyc." not in name:
                yield Path(place, name)


def libraries(objects: list[Path]) -> set[Path]:
    """Return the shared libraries that some programs and modules need, the loader among them."""
    found: set[Path] = set()
    output = subprocess.run(["ldd", *objects], capture_output=True, text=True, check=False).stdout
    for line in output.splitlines():
        for word in line.split():
            if word.startswith("/") and not word.endswith(":"):
                found.add(Path(word))
    return found


def entry(name: str, mode: int, data: bytes, changed: int = 0) -> bytes:
    """Return a file of a cpio archive in the format "newc".

    Without the time of its last change, Python would compile each module anew.
    """
    path = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, changed, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


@frozen
class Guest:
    """What a kernel runs: files, by their path in the guest, and where Python and its packages are there.

    Attributes:
        links: folders that are those in /usr of the same name.
    """

    files: dict[Path, Path]
    python: Path
    path: list[Path]
    qemu: str
    links: tuple[str, ...] = ()


def here() -> Guest:
    """Return this interpreter with its packages."""
    python = Path(sys.executable).resolve()
    folders = [Path(sysconfig.get_paths()["stdlib"]), PACKAGES]
    content = {python, *(file for folder in folders for file in files(folder))}
    content |= libraries([file for file in content if ".so" in file.suffixes or file == python])
    return Guest(
        {GUEST / file.relative_to(REPOSITORY) if REPOSITORY in file.parents else file: file for file in content}
        | tests(REPOSITORY / "aiouffd"),
        python,
        [GUEST, GUEST / PACKAGES.relative_to(REPOSITORY) if REPOSITORY in PACKAGES.parents else PACKAGES],
        "qemu-system-x86_64 -cpu max -append 'console=ttyS0 quiet panic=-1'",
    )


def of_debian(version: str, architecture: str) -> Guest:
    """Return an interpreter of Debian's, its packages, and those of this machine's that are pure Python."""
    root = debian_roots.root(version, architecture, wheel=True)
    unpacked = [file for folder in ("usr/bin", "usr/lib", "usr/lib64", "packages") for file in files(root / folder)]
    pure = {PURE / file.relative_to(PACKAGES): file for file in files(PACKAGES) if debian_roots.is_needed(file)}
    qemu = {
        "amd64": "qemu-system-x86_64 -cpu max -append 'console=ttyS0 quiet panic=-1'",
        "arm64": "qemu-system-aarch64 -M virt -cpu neoverse-n1 -append 'console=ttyAMA0 quiet panic=-1'",
    }
    return Guest(
        pure | {Path("/") / file.relative_to(root): file for file in unpacked} | tests(),
        Path(f"/usr/bin/python{version}"),
        [Path("/packages"), PURE],
        qemu[architecture],
        ("lib", "lib64"),
    )


def image(kernel: str, architecture: str, *, large_pages: bool) -> Path:
    """Return a kernel: a file, or the last of Debian's of a version, of all its suites."""
    if Path(kernel).exists():
        return Path(kernel)
    suite = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie"}.get(kernel, "trixie-backports")
    flavour = f"{architecture}-16k" if large_pages else f"cloud-{architecture}"
    kind = "binary" if [int(number) for number in kernel.split(".")] >= [7, 2] else "image"
    package = rf"linux-{kind}-{re.escape(kernel)}\.\S*-{flavour}"
    root = unpacked(f"matrix-linux-{kernel}-{flavour}", suite, [package], architecture=architecture)
    (found,) = root.rglob("vmlinuz*")
    return found


def tests(*folders: Path) -> dict[Path, Path]:
    """Return the files of the repository that tests need, and those below some folders, by their path in the guest."""
    found = [
        REPOSITORY / "pyproject.toml",
        *(file for folder in (*folders, REPOSITORY / "tests") for file in files(folder)),
    ]
    return {GUEST / file.relative_to(REPOSITORY): file for file in found}


def archive(target: Path, guest: Guest, arguments: list[str]) -> None:
    """Write the initial RAM disk."""
    path = ":".join(map(str, guest.path))
    init = INIT.format(python=guest.python, path=path, repository=str(GUEST), arguments=arguments)
    made: set[Path] = set()
    with target.open("wb") as file:
        for name in guest.links:
            file.write(entry(name, 0o120777, f"usr/{name}".encode()))
        for place, source in sorted(guest.files.items()):
            for folder in reversed(place.parents[:-1]):
                if folder not in made:
                    made.add(folder)
                    file.write(entry(str(folder)[1:], 0o040755, b""))
            if source.exists():
                file.write(entry(str(place)[1:], 0o100755, source.read_bytes(), int(source.stat().st_mtime)))
        file.write(entry("init", 0o100755, init.encode()))
        file.write(entry("TRAILER!!!", 0, b""))


def boot(kernel: Path, disk: Path, qemu: str, *, memory: int, timeout: float) -> tuple[int, str]:
    """Boot a kernel; return the exit status of its tests, or 1 if it has not come to their end in time, and a row."""
    command = shlex.split(f"{qemu} -accel tcg,thread=multi -smp 2 -m {memory} -nographic -no-reboot")
    status, machine, summary = 1, [str(kernel), "?", "0", "?"], "did not come to an end"
    with subprocess.Popen(
        [*command, "-kernel", kernel, "-initrd", disk], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as guest:
        timer = subprocess.Popen(["sh", "-c", f"sleep {timeout}; kill {guest.pid}"], start_new_session=True)
        try:
            assert guest.stdout is not None
            for line in guest.stdout:
                text = line.decode(errors="replace").rstrip()
                print(text, flush=True)
                if text.startswith("MATRIX exit "):
                    status = int(text.split()[2])
                elif text.startswith("MATRIX "):
                    machine = text.split()[1:]
                elif found := SUMMARY.search(text):
                    summary = found[0]
        finally:
            timer.kill()
            timer.wait()
            guest.kill()
    release, name, page, python = machine
    return status, f"| {release.partition('+')[0]} | {name} | {int(page) >> 10} KiB | {python} | {summary}"


def main() -> int:
    """Boot each kernel in turn; the status is that of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", metavar="KERNEL")
    parser.add_argument("--python", metavar="VERSION", help="of Debian's; by default this interpreter, or 3.13")
    parser.add_argument("--arm64", action="store_const", const="arm64", default="amd64", dest="architecture")
    parser.add_argument("--16k", action="store_true", dest="large_pages", help="kernels with pages of 16 KiB (arm64)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for each kernel")
    parser.add_argument("--memory", type=int, default=2048, help="MiB for each kernel")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, default=SMOKE, help="arguments of pytest")
    given = parser.parse_args()
    kernels = [image(kernel, given.architecture, large_pages=given.large_pages) for kernel in given.kernels]
    own = given.python is None and given.architecture == "amd64"
    guest = here() if own else of_debian(given.python or "3.13", given.architecture)
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk.cpio"
        archive(disk, guest, given.tests)
        results = [boot(one, disk, guest.qemu, memory=given.memory, timeout=given.timeout) for one in kernels]
    tests = "smoke" if given.tests == SMOKE else " ".join(given.tests)
    for _, row in results:
        print(f"{row}: {tests} |")
    return next((status for status, _ in results if status), 0)


if __name__ == "__main__":
    sys.exit(main())
