"""Boot kernels under QEMU with this package and its tests, and run some of them there.

    python tests/matrix/boot.py KERNEL... [--timeout SECONDS] [--memory MIB] [--tests PYTEST-ARGUMENT...]

A KERNEL is an image (vmlinuz). Debian's come with `apt-get download linux-image-VERSION-cloud-amd64` and `dpkg -x`; no
module is needed. Everything is in an initial RAM disk: this interpreter, its packages, the repository. The kernel
runs with TCG, so that this works on any machine that has qemu-system-x86; it takes some minutes. By default the tests
are those of test_smoke.py, which hold on each kernel since 5.10.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[2]
GUEST = Path("/repository")
"""Where the repository is in the guest, whose /tmp is empty."""
LEFT_OUT = {
    *(
        "test",
        "idlelib",
        "lib2to3",
        "tkinter",
        "ensurepip",
        "turtledemo",
        "config-3.11-x86_64-linux-gnu",
        "site-packages",
    ),
    *("pip", "setuptools", "mypy", "mypyc", "matplotlib", "mpl_toolkits", "PIL", "pillow.libs", "fontTools", "libcst"),
    *("textual", "kiwisolver", "obstore", "aiohttp", "ast_serialize", "contourpy", "ruff", "memray", "mutmut"),
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
    AIOUFFD_TEST_DEADLINE="300")
os.chdir({repository!r})
print("MATRIX kernel", os.uname().release, flush=True)
code = subprocess.call([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "timeout=400", *{arguments!r}])
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


def moved(path: Path) -> Path:
    """Return where a file is in the guest."""
    return GUEST / path.relative_to(REPOSITORY) if REPOSITORY in path.parents else path


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


def archive(target: Path, arguments: list[str]) -> None:
    """Write the initial RAM disk."""
    python = Path(sys.executable).resolve()
    packages = Path(sysconfig.get_paths()["purelib"])
    folders = [Path(sysconfig.get_paths()["stdlib"]), packages, REPOSITORY / "aiouffd", REPOSITORY / "tests"]
    content = {python, REPOSITORY / "pyproject.toml", *(file for folder in folders for file in files(folder))}
    objects = [file for file in content if ".so" in file.suffixes or file == python]
    content |= libraries(objects)
    init = INIT.format(python=python, path=f"{GUEST}:{moved(packages)}", repository=str(GUEST), arguments=arguments)
    made: set[Path] = set()
    with target.open("wb") as file:
        for source in sorted(content):
            place = moved(source)
            for folder in reversed(place.parents[:-1]):
                if folder not in made:
                    made.add(folder)
                    file.write(entry(str(folder)[1:], 0o040755, b""))
            if source.exists():
                file.write(entry(str(place)[1:], 0o100755, source.read_bytes(), int(source.stat().st_mtime)))
        file.write(entry("init", 0o100755, init.encode()))
        file.write(entry("TRAILER!!!", 0, b""))


def boot(kernel: Path, disk: Path, *, memory: int, timeout: float) -> int:
    """Boot a kernel; return the exit status of its tests, or 1 if it has not come to their end in time."""
    command = shlex.split(
        f"qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m {memory} -nographic -no-reboot"
        " -append 'console=ttyS0 quiet panic=-1'"
    )
    status = 1
    with subprocess.Popen(
        [*command, "-kernel", kernel, "-initrd", disk], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as qemu:
        timer = subprocess.Popen(["sh", "-c", f"sleep {timeout}; kill {qemu.pid}"], start_new_session=True)
        try:
            assert qemu.stdout is not None
            for line in qemu.stdout:
                text = line.decode(errors="replace").rstrip()
                print(text, flush=True)
                if text.startswith("MATRIX exit "):
                    status = int(text.split()[2])
        finally:
            timer.kill()
            timer.wait()
            qemu.kill()
    return status


def main() -> int:
    """Boot each kernel in turn; the status is that of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", type=Path, metavar="KERNEL")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for each kernel")
    parser.add_argument("--memory", type=int, default=2048, help="MiB for each kernel")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, default=SMOKE, help="arguments of pytest")
    arguments = parser.parse_args()
    results: dict[Path, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk.cpio"
        archive(disk, arguments.tests)
        for kernel in arguments.kernels:
            results[kernel] = boot(kernel, disk, memory=arguments.memory, timeout=arguments.timeout)
    for kernel, status in results.items():
        print(f"{'passed' if status == 0 else f'FAILED ({status})'}: {kernel}")
    return next((status for status in results.values() if status), 0)


if __name__ == "__main__":
    sys.exit(main())
