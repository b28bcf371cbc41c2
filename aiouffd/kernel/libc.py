"""System calls that the standard library does not offer, through ctypes. Each raises OSError with the errno."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from typing import TYPE_CHECKING

from aiouffd.kernel import abi

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "allocate",
    "ask_for_short_slices",
    "copy_memory",
    "keep_freed_memory",
    "lock_on_fault",
    "madvise",
    "mincore",
    "mmap_fixed",
    "mprotect",
    "mremap",
    "munlock",
    "munmap",
    "peek",
    "punch_hole",
    "syscall",
    "write_memory",
    "write_out",
]

_libc = ctypes.CDLL(None, use_errno=True)  # CDLL, not PyDLL: these calls may sleep, so ctypes releases the GIL
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_uint]
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    *(ctypes.c_int, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong)
]
_libc.process_vm_writev.restype = ctypes.c_ssize_t
_libc.process_vm_writev.argtypes = _libc.process_vm_readv.argtypes
_libc.pwrite.restype = ctypes.c_ssize_t
_libc.pwrite.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

PROT_NONE = 0
MADV_DONTFORK = 10
MADV_DOFORK = 11
MADV_POPULATE_READ = 22  # Linux 5.14
MADV_POPULATE_WRITE = 23
MADV_DONTNEED_LOCKED = 24  # Linux 5.18
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4

_MAP_FIXED = 0x10
_MLOCK_ONFAULT = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_MMAP_THRESHOLD = 32 << 20  # larger values are refused
_SCHED_ATTR = struct.Struct("=IIQiIQQQII")  # size, policy, flags, nice, priority, runtime, deadline, period, two clamps
_SHORT_SLICE_NS = 100_000  # the shortest that the kernel takes
_FALLOC_FL_KEEP_SIZE = 1
_SYNC_FILE_RANGE_WRITE = 2
_FALLOC_FL_PUNCH_HOLE = 2
_FAILED = ctypes.c_void_p(-1).value


def _check(result: int) -> int:
    if result == -1:
        raise _last_error()
    return result


def _check_address(result: int | None) -> int:
    if result is None or result == _FAILED:
        raise _last_error()
    return result


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def syscall(number: int, *args: int) -> int:
    """Call a system call by its number. The arguments are passed as longs."""
    return _check(int(_libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args))))


def mprotect(address: int, length: int, protection: int) -> None:
    """Set the protection of the page-aligned range [address, address + length)."""
    _check(_libc.mprotect(address, length, protection))


def madvise(address: int, length: int, advice: int) -> None:
    """Give advice on [address, address + length). `address` is page-aligned."""
    _check(_libc.madvise(address, length, advice))


def munmap(address: int, length: int) -> None:
    """Unmap [address, address + length)."""
    _check(_libc.munmap(address, length))


def mremap(address: int, old_length: int, new_length: int, flags: int, new_address: int = 0) -> int:
    """Move or resize a mapping. Return its new address."""
    return _check_address(_libc.mremap(address, old_length, new_length, flags, new_address))


def mmap_fixed(
    address: int,
    length: int,
    protection: int = mmap.PROT_READ | mmap.PROT_WRITE,
    flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
    fd: int = -1,
    offset: int = 0,
) -> None:
    """Map memory at `address`, by default anonymous and private, and replace what is mapped there."""
    _check_address(_libc.mmap(address, length, protection, flags | _MAP_FIXED, fd, offset))


def munlock(address: int, length: int) -> None:
    """Unlock [address, address + length), which mlock or mlockall has locked in memory."""
    _check(_libc.munlock(address, length))


def lock_on_fault(address: int, length: int) -> None:
    """Lock each page of [address, address + length) in memory when it comes (mlock2, Linux 4.4). None is brought."""
    syscall(abi.SYS_MLOCK2, address, length, _MLOCK_ONFAULT)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Remove the pages [offset, offset + length) of a memfd, for every process that maps it."""
    _check(_libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length))


def write_out(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write [offset, offset + length) of a file to its disk (sync_file_range(2))."""
    _check(_libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE))


def allocate(fd: int, offset: int, length: int) -> None:
    """Give a file in memory pages at [offset, offset + length): those that it has not are zeros (fallocate(2)).

    Any signal interrupts that where the pages are huge (EINTR). Those that the file has by then are kept.
    """
    while _libc.fallocate(fd, 0, offset, length):
        if ctypes.get_errno() != errno.EINTR:
            raise _last_error()


def write_memory(fd: int, address: int, length: int, offset: int) -> None:
    """Write bytes of this process to a place in a file. A bad address is EFAULT, and raises no signal."""
    while length:
        done = _check(_libc.pwrite(fd, address, length, offset))
        address, length, offset = address + done, length - done, offset + done


def copy_memory(target: int, source: int, length: int) -> None:
    """Copy bytes within this process. A bad address is EFAULT, and raises no signal (process_vm_writev, Linux 3.2)."""
    while length:
        local, remote = struct.pack("=QQ", source, length), struct.pack("=QQ", target, length)
        done = _check(_libc.process_vm_writev(os.getpid(), local, 1, remote, 1, 0))
        target, source, length = target + done, source + done, length - done


def keep_freed_memory(size: int) -> None:
    """Have malloc(3) keep up to `size` bytes of what is freed, for the next who asks; for the whole process.

    Else glibc gives buffers of megabytes back to the kernel, and each new one costs a page fault for each page. There
    is one heap for all threads from now on, since one thread frees what another has filled. Only glibc has these
    settings (mallopt(3)).
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, size)
        mallopt(_M_ARENA_MAX, 1)


def ask_for_short_slices() -> None:
    """Have this thread, and those that it starts, run soon after it is woken, and for a shorter time then.

    It gets no more processor time than before. Linux 6.12 takes this of a thread of the usual policy, without a
    privilege: it preempts threads with longer slices when it wakes up. Where a thread has another policy, or the kernel
    is older or refuses it, nothing changes.
    """
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread
    attributes = ctypes.create_string_buffer(
        _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, _SHORT_SLICE_NS, 0, 0, 0, 0), _SCHED_ATTR.size
    )
    with contextlib.suppress(OSError):
        syscall(abi.SYS_SCHED_SETATTR, 0, ctypes.addressof(attributes), 0)


def mincore(address: int, length: int) -> bytes:
    """Return a byte for each page of [address, address + length), of `mmap.PAGESIZE`. Bit 0: it is in memory."""
    vector = bytearray((length + mmap.PAGESIZE - 1) // mmap.PAGESIZE)  # a ctypes array would be a new type: 15 us
    _check(_libc.mincore(address, length, ctypes.addressof(ctypes.c_char.from_buffer(vector))))
    return bytes(vector)


def peek(addresses: Sequence[int]) -> bytes:
    """Return the byte at each of at most 1024 addresses of this process, up to the first that cannot be read.

    A bad address raises no signal. Where a seccomp filter forbids process_vm_readv (Linux 3.2), the result is empty.
    """
    count = len(addresses)
    data = ctypes.create_string_buffer(count)
    local = struct.pack("=QQ", ctypes.addressof(data), count)
    remote = struct.pack(f"={2 * count}Q", *(word for address in addresses for word in (address, 1)))
    got = _libc.process_vm_readv(os.getpid(), local, 1, remote, count, 0)
    return data.raw[: max(got, 0)]
