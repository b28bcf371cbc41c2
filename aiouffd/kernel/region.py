"""Memory that can be registered: an `mmap.mmap` that knows its address and page size."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import TYPE_CHECKING, Any, Protocol, Self

from aiouffd.errors import BusyError, UnsupportedError
from aiouffd.kernel import libc
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["Region"]

MAP_NORESERVE = 0x4000
MAP_HUGETLB = 0x40000
MAP_HUGE_SHIFT = 26
_EBUSY = 16


class LayoutChange(Protocol):
    """Takes down how the layout has changed, while the change is under way."""

    def removed(self, start: int, length: int) -> None:
        """Bytes [start, start + length) of the region have been emptied (offsets)."""

    def moved(self, address: int, length: int) -> None:
        """Take note that the region lies at `address` now and has `length` bytes; have it registered there."""


class LayoutListener(Protocol):
    """Whoever serves a region is told of the layout changes that go through the `Region` object."""

    def changing(self) -> AbstractContextManager[LayoutChange]:
        """Serve nothing until the block is left. An exception in it: nothing has changed."""


class Region(mmap.mmap):
    """Anonymous memory to be filled on demand: numpy, memoryview and slices work on it as on any mmap.

    Args:
        length: bytes; any length. `len()` is exact, the mapping is rounded up to whole pages.
        page_size: 4096, or 2 MiB (or another size that the machine has) for hugetlb pages, which are reserved
            at once: too few of them (`sysctl vm.nr_hugepages`) is an OSError here.
        shared: backed by a memfd that other processes can map too (`fd`, `from_fd`).

    Small pages are not reserved (MAP_NORESERVE), so a region may be larger than memory. The mapping ends with
    `close()`, which fails with BufferError while views exist, or with the last reference.
    """

    address: int
    page_size: int
    fd: int
    monitor: Any
    """The Monitor that serves it, or None."""
    _listener: LayoutListener | None
    _keep: list[Any]

    def __new__(cls, length: int, *, page_size: int = mmap.PAGESIZE, shared: bool = False) -> Self:
        """Map the memory."""
        _check(length, page_size)
        if shared:
            huge = os.MFD_HUGETLB | ((page_size.bit_length() - 1) << MAP_HUGE_SHIFT)
            flags = os.MFD_CLOEXEC | (huge if page_size > mmap.PAGESIZE else 0)
            fd = os.memfd_create("aiouffd-region", flags)
            try:
                os.ftruncate(fd, align_up(length, page_size))
                return cls._map(fd, length, page_size)
            except BaseException:
                os.close(fd)
                raise
        return cls._map(-1, length, page_size)

    def __init__(self, length: int, *, page_size: int = mmap.PAGESIZE, shared: bool = False) -> None:
        """All is done in `__new__`, as in mmap itself."""

    @classmethod
    def from_fd(cls, fd: int, length: int | None = None, *, page_size: int = mmap.PAGESIZE) -> Self:
        """Map a shared region's memfd (or another shmem file), all of it or its first `length` bytes.

        The descriptor is duplicated; the caller's stays the caller's.
        """
        length = os.fstat(fd).st_size if length is None else length
        _check(length, page_size)
        own = os.dup(fd)
        try:
            return cls._map(own, length, page_size)
        except BaseException:
            os.close(own)
            raise

    @classmethod
    def _map(cls, fd: int, length: int, page_size: int) -> Self:
        flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if page_size == mmap.PAGESIZE:
            flags |= MAP_NORESERVE
        elif fd < 0:
            flags |= MAP_HUGETLB | ((page_size.bit_length() - 1) << MAP_HUGE_SHIFT)
        try:
            self = super().__new__(cls, fd, length, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            if page_size > mmap.PAGESIZE:
                raise UnsupportedError(
                    f"{align_up(length, page_size) // page_size} free huge pages of {page_size >> 10} KiB",
                    f"{error.strerror}; set vm.nr_hugepages",
                ) from error
            raise
        self.page_size = page_size
        self.fd = fd
        self.monitor = None
        self._listener = None
        self._keep = []
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        return self

    @property
    def mapped_length(self) -> int:
        """`len()` rounded up to whole pages: what is really mapped, and what is registered."""
        return align_up(len(self), self.page_size)

    def listen(self, listener: LayoutListener | None) -> None:
        """Have layout changes told to whoever serves the region without the kernel's events; None: to nobody."""
        self._listener = listener

    def keep(self, thing: object) -> None:
        """Keep an object alive for as long as the region is mapped."""
        self._keep.append(thing)

    def madvise(self, option: int, start: int = 0, length: int | None = None) -> None:
        """As `mmap.madvise`; what is emptied reads as zeros afterwards, not as the source's data."""
        length = len(self) - start if length is None else length
        if self._listener is None or option not in (mmap.MADV_DONTNEED, mmap.MADV_REMOVE):
            super().madvise(option, start, length)
            return
        with self._listener.changing() as change:
            super().madvise(option, start, length)
            change.removed(start, length)

    def resize(self, newsize: int) -> None:
        """As `mmap.resize`; the mapping may move. What is added reads as zeros.

        With `InProcess` and `InThread` another thread that touches it meanwhile gets SIGSEGV.

        Raises:
            BufferError: views of the region exist.
            BusyError: the loop that serves it does not run.
        """
        if self._listener is None:
            super().resize(newsize)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self))
            return
        super().resize(len(self))  # changes nothing; raises if there are views, which are not to lose their memory
        with self._listener.changing() as change:
            # Without EVENT_REMAP moved memory is registered no longer, and missing pages would read as zeros until it
            # is again. For that moment nobody can touch it: SIGSEGV, and no wrong bytes.
            libc.mprotect(self.address, self.mapped_length, 0)
            try:
                super().resize(newsize)
            except BaseException:
                libc.mprotect(self.address, self.mapped_length, mmap.PROT_READ | mmap.PROT_WRITE)
                raise
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self))
            change.moved(self.address, newsize)
            libc.mprotect(self.address, self.mapped_length, mmap.PROT_READ | mmap.PROT_WRITE)

    def close(self) -> None:
        """Unmap it.

        Raises:
            BusyError: a Monitor is serving it: leave that first.
            BufferError: views of it exist.
        """
        if self.closed:
            return
        if self.monitor is not None:
            raise BusyError("munmap", self.address, len(self), _EBUSY)
        length = self.mapped_length
        super().close()
        if self.page_size > mmap.PAGESIZE:
            # mmap.close() has unmapped len() bytes; on hugetlb munmap(2) insists on whole huge pages (EINVAL
            # else), so that an odd length is still mapped.
            libc.munmap(self.address, length)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._keep.clear()

    def __del__(self) -> None:
        # Nobody holds a view any more, or the region would be alive; unless the interpreter ends.
        if hasattr(self, "_keep"):
            self.monitor = None
            with contextlib.suppress(BufferError):
                self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} bytes at {self.address:#x}"
        return f"<Region {state}, pages of {self.page_size}{', shared' if self.fd >= 0 else ''}>"


def _check(length: int, page_size: int) -> None:
    if length <= 0:
        raise ValueError(f"a region has at least one byte, not {length}")
    if page_size < mmap.PAGESIZE or page_size & (page_size - 1):
        raise ValueError(f"page_size is a power of two of at least {mmap.PAGESIZE}, not {page_size}")
