"""The other way to fill memory from Python: a FUSE file system that serves one file, which is then mmapped.

`mounted` runs it in a process of its own: `python -m benchmarks.fuse FILE MOUNTPOINT`. As fast as pyfuse3 can be: the
answer is a view of the mapped file, without a copy, on uvloop, and the kernel reads ahead by FUSE's default of 128 KiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import importlib.util
import mmap
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = b"file"
FILE_INODE = 2
MNT_DETACH = 2


def unavailable() -> str | None:
    """Return why there can be no FUSE file system here, or None."""
    if importlib.util.find_spec("pyfuse3") is None:
        return "pyfuse3 is not installed (pip install pyfuse3, after apt install libfuse3-dev pkg-config)"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing, or not for this user"
    if os.geteuid() and shutil.which("fusermount3") is None:
        return "mounting needs root, or fusermount3 (apt install fuse3)"
    return None


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Path]:
    """Show a file through FUSE, freshly mounted: nothing of it is in the page cache there."""
    with tempfile.TemporaryDirectory(prefix="aiouffd-benchmark-fuse-") as mountpoint:
        command = [sys.executable, "-m", "benchmarks.fuse", str(path), mountpoint]
        root = Path(__file__).parent.parent
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                if process.stdout.readline() != b"mounted\n":
                    raise OSError(errno.EIO, f"pyfuse3 did not mount {path}")
                yield Path(mountpoint) / NAME.decode()
            finally:
                process.stdin.close()  # it unmounts then, also when this process is killed
                process.wait(10)


def operations(path: Path) -> Any:
    """Return the file system: a directory and a file."""
    import pyfuse3  # noqa: PLC0415 - not everyone has it

    file = path.open("rb")
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def attributes(inode: int) -> Any:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        directory = inode == pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o444
        entry.st_size = 0 if directory else len(data)
        entry.st_nlink = 1
        return entry

    base: Any = pyfuse3.Operations

    class OneFile(base):  # type: ignore[misc]  # Any, whether pyfuse3 is there or not
        """What FUSE asks of it."""

        async def getattr(self, inode: int, ctx: Any = None) -> Any:
            return attributes(inode)

        async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
            if name != NAME:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return attributes(FILE_INODE)

        async def open(self, inode: int, flags: int, ctx: Any) -> Any:
            return pyfuse3.FileInfo(fh=inode, keep_cache=True)

        async def read(self, fh: int, off: int, size: int) -> Any:
            return data[off : off + size]

    return OneFile()


def main(path: str, mountpoint: str) -> None:
    """Mount, serve until standard input ends, unmount."""
    import pyfuse3  # noqa: PLC0415
    import pyfuse3.asyncio  # noqa: PLC0415
    import uvloop  # noqa: PLC0415

    pyfuse3.asyncio.enable()
    options = set(pyfuse3.default_options) | {"fsname=aiouffd-benchmark", "ro"}
    pyfuse3.init(operations(Path(path)), mountpoint, options)

    def leave() -> None:
        sys.stdin.buffer.read()
        ctypes.CDLL(None).umount2(mountpoint.encode(), MNT_DETACH)
        os._exit(0)  # a request that is under way has nobody left to wait for it

    threading.Thread(target=leave, daemon=True).start()
    print("mounted", flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(pyfuse3.main())


if __name__ == "__main__":
    main(*sys.argv[1:])
