"""A file system with one file that stops answering when it is told to (`silence`), as a server behind FUSE or NFS may.

Needs /dev/fuse, root, and a mount namespace of the caller's own (`mounted` makes one: for child processes only).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_libc = ctypes.CDLL(None, use_errno=True)
_REQUEST = struct.Struct("=IIQQIIII")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _FLUSH, _INIT = 1, 2, 3, 14, 15, 25, 26
_RELEASE, _INTERRUPT, _BATCH_FORGET, _LSEEK = 18, 36, 42, 46
_KEEP_CACHE = 2


def possible() -> str | None:
    """Return why there can be no such file system here, or None."""
    if os.geteuid() != 0:
        return "mounting needs root"
    return None if Path("/dev/fuse").exists() else "there is no /dev/fuse"


@contextlib.contextmanager
def mounted(directory: str, data: bytes, *, flushes: bool = True) -> Iterator[tuple[str, int]]:
    """Mount it; yield the path of its file, and the process that serves it.

    The process is killed at the end, which fails all requests that wait.

    Args:
        directory: where it is mounted.
        data: of its file.
        flushes: whether closing a descriptor waits for an answer, also that of a process that is being started.
    """
    for call in (_libc.unshare(0x20000), _libc.mount(b"none", b"/", None, 0x44000, None)):  # NEWNS; REC | PRIVATE
        if call:
            raise OSError(ctypes.get_errno(), "no mount namespace")
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if _libc.mount(b"silent", directory.encode(), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "no mount")
    server = os.fork()
    if server == 0:
        try:
            _serve(device, data, flushes=flushes)
        finally:
            os._exit(0)
    os.close(device)
    try:
        yield f"{directory}/file", server
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def silence(server: int) -> None:
    """Stop the answers, and return when there are none any more."""
    os.kill(server, signal.SIGSTOP)
    while Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)


def _serve(device: int, data: bytes, *, flushes: bool) -> None:
    def attributes(node: int) -> bytes:
        mode, size = (0o40755, 0) if node == 1 else (0o100644, len(data))
        return struct.pack("=QQQQQQIIIIIIIIII", node, size, 1, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    while True:
        request = os.read(device, 1 << 20)
        _, code, unique, node, _, _, _, _ = _REQUEST.unpack_from(request)
        body = request[_REQUEST.size :]
        error, answer = 0, b""
        if code == _INIT:
            answer = struct.pack("=IIIIHHIIHHI", 7, 31, 1 << 17, 0, 12, 10, 1 << 17, 1, 32, 0, 0) + bytes(24)
        elif code == _LOOKUP:
            answer = struct.pack("=QQQQII", 2, 0, 0, 0, 0, 0) + attributes(2)
        elif code == _GETATTR:
            answer = struct.pack("=QII", 0, 0, 0) + attributes(node)
        elif code == _OPEN:
            answer = struct.pack("=QII", 0, _KEEP_CACHE, 0)
        elif code == _READ:
            _, offset, size = struct.unpack_from("=QQI", body)
            answer = data[offset : offset + size]
        elif code == _LSEEK:
            _, offset, whence, _ = struct.unpack("=QQII", body)
            answer = struct.pack("=Q", offset if whence == os.SEEK_DATA else len(data))
        elif code in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            continue
        elif code != _RELEASE and not (code == _FLUSH and flushes):
            error = 38  # ENOSYS
        os.write(device, struct.pack("=IiQ", 16 + len(answer), -error, unique) + answer)
