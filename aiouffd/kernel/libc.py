"""System calls that the standard library does not offer, through ctypes. Each raises OSError with the errno."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["madvise", "mincore", "mmap_fixed", "mprotect", "mremap", "munmap", "peek", "syscall"]

_libc = ctypes.CDLL(None, use_errno=True)  # CDLL, not PyDLL: these may sleep, so the GIL is dropped
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    *(ctypes.c_int, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong)
]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

MADV_DONTFORK = 10
MADV_DOFORK = 11
MADV_POPULATE_READ = 22  # Linux 5.14
MADV_POPULATE_WRITE = 23
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4

_FAILED = ctypes.c_void_p(-1).value


def _check(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(number: int, *args: int) -> int:
    """Call a system call by number; the arguments are passed as longs."""
    return _check(int(_libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args))))


def mprotect(address: int, length: int, protection: int) -> None:
    """Set the protection of [address, address + length), which is page-aligned."""
    _check(_libc.mprotect(address, length, protection))


def madvise(address: int, length: int, advice: int) -> None:
    """Give advice on [address, address + length); `address` is page-aligned."""
    _check(_libc.madvise(address, length, advice))


def munmap(address: int, length: int) -> None:
    """Unmap [address, address + length)."""
    _check(_libc.munmap(address, length))


def mremap(address: int, old_length: int, new_length: int, flags: int, new_address: int = 0) -> int:
    """Move or resize a mapping; return where it is now."""
    result = _libc.mremap(address, old_length, new_length, flags, new_address)
    if result is None or result == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


def mmap_fixed(address: int, length: int) -> None:
    """Map anonymous private memory at `address`, in place of whatever is there."""
    result = _libc.mmap(address, length, 3, 0x32, -1, 0)  # READ|WRITE, PRIVATE|ANONYMOUS|FIXED
    if result is None or result == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mincore(address: int, length: int) -> bytes:
    """Tell for each 4 KiB page of [address, address + length) whether it is in memory (bit 0 of its byte)."""
    vector = ctypes.create_string_buffer((length + 4095) // 4096)
    _check(_libc.mincore(address, length, vector))
    return vector.raw


def peek(addresses: Sequence[int]) -> bytes:
    """Return the byte at each of at most 1024 addresses of this process; fewer where one cannot be read (no signal).

    Nothing at all where a seccomp filter forbids process_vm_readv (Linux 3.2).
    """
    count = len(addresses)
    data = ctypes.create_string_buffer(count)
    local = struct.pack("=QQ", ctypes.addressof(data), count)
    remote = struct.pack(f"={2 * count}Q", *(word for address in addresses for word in (address, 1)))
    got = _libc.process_vm_readv(os.getpid(), local, 1, remote, count, 0)
    return data.raw[: max(got, 0)]
