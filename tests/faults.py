"""What a page's entry says, a handler of SIGBUS that puts things right, and pages that are pinned."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import traceback
from typing import TYPE_CHECKING, Self

from pattern import PAGE

from aiouffd.kernel import libc

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

SA_SIGINFO = 4
BUS_ADRERR = 2
BUS_MCEERR_AR = 4

SYS_IO_URING_SETUP = 425
SYS_IO_URING_REGISTER = 427
REGISTER_BUFFERS = 0
UNREGISTER_BUFFERS = 1

_libc = ctypes.CDLL(None, use_errno=True)
_Action = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_installed: list[object] = []


def entry(address: int) -> int:
    """Return the page's 64 bits of /proc/self/pagemap, of the calling process."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int.from_bytes(os.pread(fd, 8, address // PAGE * 8), "little")
    finally:
        os.close(fd)


def protected(address: int) -> bool:
    """Tell whether the page is write-protected by a userfaultfd (bit 57)."""
    return bool(entry(address) >> 57 & 1)


def frame(address: int) -> int:
    """Return the number of the physical page that is mapped there (bits 0-54), which only root is shown."""
    found = entry(address)
    assert found >> 63, "no page is there"
    assert found & (1 << 55) - 1, "frame numbers are hidden: CAP_SYS_ADMIN is missing"
    return found & (1 << 55) - 1


def on_sigbus(action: Callable[[int, int, int], None]) -> None:
    """Have `action(address, si_code, size)` called in the faulting thread; it must remove the cause of the signal.

    Python's own handlers run only after the instruction, which would never end. `size` is that of the poisoned page,
    and means something with BUS_MCEERR_AR only.
    """

    def handler(_: int, info: int, __: int) -> None:
        try:
            (code,) = struct.unpack("i", ctypes.string_at(info + 8, 4))
            address, shift = struct.unpack("Qh", ctypes.string_at(info + 16, 10))
            action(address, code, 1 << shift if code == BUS_MCEERR_AR else 0)
        except BaseException:  # noqa: BLE001 - to return would be to fault for ever
            traceback.print_exc()
            os._exit(1)

    callback = _Action(handler)
    _installed.append(callback)
    place = ctypes.cast(callback, ctypes.c_void_p).value
    argument = ctypes.create_string_buffer(struct.pack("Q128siQ", place, b"", SA_SIGINFO, 0))
    assert _libc.sigaction(signal.SIGBUS, argument, None) == 0


class Pinned:
    """Memory that is pinned for long, and for writing (FOLL_PIN | FOLL_LONGTERM), as a registered buffer of io_uring.

    Raises:
        OSError: ENOSYS, EPERM: this kernel has no io_uring, or does not let us use it.
    """

    def __init__(self, address: int, length: int) -> None:
        parameters = ctypes.create_string_buffer(120)
        self._ring = libc.syscall(SYS_IO_URING_SETUP, 1, ctypes.addressof(parameters))
        vector = ctypes.create_string_buffer(struct.pack("QQ", address, length))
        libc.syscall(SYS_IO_URING_REGISTER, self._ring, REGISTER_BUFFERS, ctypes.addressof(vector), 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        libc.syscall(SYS_IO_URING_REGISTER, self._ring, UNREGISTER_BUFFERS, 0, 0)
        os.close(self._ring)
