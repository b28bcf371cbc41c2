"""Boot kernels under QEMU with this package and its tests, and run some of them there.

    python tests/matrix/boot.py KERNEL... [--arm64 FOLDER] [--timeout SECONDS] [--memory MIB] [--tests ARGUMENT...]

A KERNEL is an image (vmlinuz). Debian's come with `apt-get download linux-image-VERSION-cloud-amd64`, or
`linux-binary-VERSION-cloud-amd64` since 7.2, and `dpkg -x`; no module is needed. Everything is in an initial RAM disk:
this interpreter, its packages, the repository. The kernel runs with TCG, so that this works on any machine that has
qemu-system-x86; it takes some minutes. By default the tests are those of test_smoke.py, which hold on each kernel since
5.10.

Kernels of arm64 (`linux-image-VERSION-arm64-16k` has pages of 16 KiB) need qemu-system-arm and a FOLDER that holds a
file system: Debian's python3.11 for arm64 (the minor version of this interpreter) with all that it depends on, unpacked
by `dpkg -x`, and in `FOLDER/packages` the packages with native parts, among them the wheel of `tools/wheels.py`:

    pip install --no-deps --only-binary=:all: --implementation cp --python-version 3.11 --target FOLDER/packages
        --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 dist/*aarch64.whl uvloop numpy hypothesis
    python -m compileall -q FOLDER/usr/lib/python3.11 FOLDER/packages

Packages in pure Python, and the tests, are those of this machine. aiouffd is that of the wheel.
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

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[2]
PACKAGES = Path(sysconfig.get_paths()["purelib"])
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
NEEDED = re.compile(
    r"_?(attrs?|cloudpickle|blockbuster|forbiddenfruit|sortedcontainers|py|py_?test.*|pluggy|iniconfig|packaging|xdist"
    r"|execnet|pygments|click|rich|markdown_it.*|mdurl|prometheus_client|typing_extensions)(-[0-9].*|\.py)?$"
)
"""Packages in pure Python that tests need."""
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
    AIOUFFD_TEST_DEADLINE="1800")
os.chdir({repository!r})
print("MATRIX kernel", os.uname().release, flush=True)
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
    """What a kernel runs: files, by their path in the guest, and where Python and its packages are there."""

    files: dict[Path, Path]
    python: Path
    path: list[Path]
    qemu: str


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


def arm64(root: Path) -> Guest:
    """Return an interpreter for arm64, its packages, and those of this machine's that are pure Python."""
    unpacked = [file for folder in ("lib", "usr/bin", "usr/lib", "packages") for file in files(root / folder)]
    (python,) = (file for file in unpacked if re.fullmatch(r"python3\.\d+", file.name))
    pure = {
        PURE / file.relative_to(PACKAGES): file
        for file in files(PACKAGES)
        if NEEDED.match(file.relative_to(PACKAGES).parts[0])
    }
    return Guest(
        pure | {Path("/") / file.relative_to(root): file for file in unpacked} | tests(),
        Path("/") / python.relative_to(root),
        [Path("/packages"), PURE],
        "qemu-system-aarch64 -M virt -cpu neoverse-n1 -append 'console=ttyAMA0 quiet panic=-1'",
    )


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
        for place, source in sorted(guest.files.items()):
            for folder in reversed(place.parents[:-1]):
                if folder not in made:
                    made.add(folder)
                    file.write(entry(str(folder)[1:], 0o040755, b""))
            if source.exists():
                file.write(entry(str(place)[1:], 0o100755, source.read_bytes(), int(source.stat().st_mtime)))
        file.write(entry("init", 0o100755, init.encode()))
        file.write(entry("TRAILER!!!", 0, b""))


def boot(kernel: Path, disk: Path, qemu: str, *, memory: int, timeout: float) -> int:
    """Boot a kernel; return the exit status of its tests, or 1 if it has not come to their end in time."""
    command = shlex.split(f"{qemu} -accel tcg,thread=multi -smp 2 -m {memory} -nographic -no-reboot")
    status = 1
    with subprocess.Popen(
        [*command, "-kernel", kernel, "-initrd", disk], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as machine:
        timer = subprocess.Popen(["sh", "-c", f"sleep {timeout}; kill {machine.pid}"], start_new_session=True)
        try:
            assert machine.stdout is not None
            for line in machine.stdout:
                text = line.decode(errors="replace").rstrip()
                print(text, flush=True)
                if text.startswith("MATRIX exit "):
                    status = int(text.split()[2])
        finally:
            timer.kill()
            timer.wait()
            machine.kill()
    return status


def main() -> int:
    """Boot each kernel in turn; the status is that of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", type=Path, metavar="KERNEL")
    parser.add_argument("--arm64", type=Path, metavar="FOLDER", help="a file system; the kernels are of arm64")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for each kernel")
    parser.add_argument("--memory", type=int, default=2048, help="MiB for each kernel")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, default=SMOKE, help="arguments of pytest")
    arguments = parser.parse_args()
    results: dict[Path, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk.cpio"
        guest = arm64(arguments.arm64) if arguments.arm64 else here()
        archive(disk, guest, arguments.tests)
        for kernel in arguments.kernels:
            results[kernel] = boot(kernel, disk, guest.qemu, memory=arguments.memory, timeout=arguments.timeout)
    for kernel, status in results.items():
        print(f"{'passed' if status == 0 else f'FAILED ({status})'}: {kernel}")
    return next((status for status in results.values() if status), 0)


if __name__ == "__main__":
    sys.exit(main())
