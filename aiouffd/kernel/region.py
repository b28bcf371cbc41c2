"""Memory that can be registered: an `mmap.mmap` that knows its address and page size."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import mmap
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, Self, SupportsIndex

from aiouffd.errors import BusyError, ClosedError, PopulatedError, UnsupportedError
from aiouffd.kernel import libc
from aiouffd.kernel.limits import limit_error, no_huge_pages
from aiouffd.kernel.locked import empty_locked, is_populated, new_mappings_are_populated
from aiouffd.kernel.memory import MAP_NORESERVE, mapped
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.kernel.pagemap import Pagemap, data_ranges
from aiouffd.lifetime import until_exit
from aiouffd.ranges import Range, RangeSet, align_up

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from aiouffd.native.crash_notes import Note

__all__ = ["HUGE_PAGE", "Region"]

MAP_HUGETLB: Final = 0x40000
MAP_HUGE_SHIFT: Final = 26
HUGE_PAGE: Final = 2 << 20
"""Bytes of a transparent huge page, where pages have 4 KiB."""

_IN_MEMORY: Final = 1  # bit of mincore(2)
_MAP_FIXED_NOREPLACE: Final = 0x100000  # Linux 4.17
_RESERVED_AGAIN: Final = 8  # times: what this thread allocates meanwhile may come there

_never_closed: dict[int, Region] = {}
_regions: weakref.WeakSet[Region] = weakref.WeakSet()


class LayoutChange(Protocol):
    """Takes note of how the layout changes, while it changes."""

    def removed(self, start: int, length: int) -> None:
        """Bytes [start, start + length) of the region were emptied (offsets)."""

    def moved(self, address: int, length: int) -> None:
        """The region lies at `address` now, has `length` bytes, and is registered there when this returns."""


class LayoutListener(Protocol):
    """Serves a region without the kernel's layout events, and so makes its layout changes."""

    @property
    def may_wait(self) -> bool:
        """Whether this thread may wait for a missing page: it does not run the loop that brings it."""

    def change(self, work: Callable[[LayoutChange], None]) -> None:
        """Call `work`, in whatever thread, at a moment when nothing is placed. If it raises, nothing has changed."""


class Region(mmap.mmap):
    """Anonymous memory that is filled on demand: numpy, memoryview and slices work on it as on any mmap.

    Args:
        length: bytes; any length. `len()` is exact, the mapping is rounded up to whole pages.
        page_size: `mmap.PAGESIZE`, or 2 MiB (or another size that the machine has) for hugetlb pages. Those are
            reserved at once: too few of them (`sysctl vm.nr_hugepages`) is an UnsupportedError here.
        shared: backed by a memfd that other processes can map too (`fd`, `from_fd`).

    Small pages are not reserved (MAP_NORESERVE), so a region may be larger than memory. The mapping ends with
    `close()`, which fails with BufferError while views exist, or with the last reference.

    A Monitor serves pages that are missing when it is entered. Pages that are present then stay as they are. Two
    things make pages present without the program's doing:

    - **Locked memory.** mlockall(MCL_FUTURE) fills each new mapping with zeros. A region is made without that, and is
      locked page by page as its pages come (MLOCK_ONFAULT, Linux 4.4). What mlock or mlockall(MCL_CURRENT) has filled
      before the first Monitor is entered is dropped again; entering raises PopulatedError where others share it.
    - **Another mapping of shared memory.** A process that maps a shared region's memfd without a Monitor of its own,
      and touches a missing page of it, makes the kernel put a page of zeros into the file: for all processes, for good.
      userfaultfd cannot prevent this. Let each process that maps the memfd have a Monitor (`from_fd`), or touch only
      pages that are present. A Monitor logs a warning if it finds such a mapping in its own process;
      `Statistics.continues` counts the pages that were in the file before they were touched in the region.

    For gdb, /proc/PID/mem (EIO) and core dumps missing pages are missing, too; process_vm_readv(2) waits like a touch.

    Raises:
        LimitError: a limit of the process or machine; the error names it.
        UnsupportedError: there are no, or too few, huge pages of this size.
    """

    address: int
    """Of the first byte. `resize` may change it. Pages that are touched there, by native code too, are served."""
    page_size: int
    fd: int
    monitor: Any
    """The Monitor that serves it, or None: before its block is entered, and when it was left."""
    never_served: bool
    """Whether no Monitor has been entered yet: until then zeros may be the kernel's, see `kernel.populated`."""
    withheld: bool
    """Whether forked children do not get it, or not all of it (MADV_DONTFORK)."""
    reopens: tuple[Callable[..., Region], tuple[Any, ...]] | None
    """What a pickle of it holds: a function and its arguments, which bring such a region anywhere."""
    _inherited: bool
    _adopted: bool
    _listener: LayoutListener | None
    _note: Note | None
    _keep: list[Any]
    _owned: OwnedDescriptor

    def __new__(cls, length: int, *, page_size: int = mmap.PAGESIZE, shared: bool = False) -> Self:
        """Map the memory."""
        _check(length, page_size)
        if not shared:
            return cls._map(-1, length, page_size)
        huge = os.MFD_HUGETLB | ((page_size.bit_length() - 1) << MAP_HUGE_SHIFT)
        flags = os.MFD_CLOEXEC | (huge if page_size > mmap.PAGESIZE else 0)
        try:
            fd = os.memfd_create("aiouffd-region", flags)
        except OSError as error:
            raise _refusal(error, length, page_size) from error
        return cls._map(fd, length, page_size, new=True)

    def __init__(self, length: int, *, page_size: int = mmap.PAGESIZE, shared: bool = False) -> None:
        """`__new__` does everything, as in mmap itself."""

    @classmethod
    def from_fd(cls, fd: int, length: int | None = None, *, page_size: int = mmap.PAGESIZE) -> Self:
        """Map a shared region's memfd (or another shmem file), all of it or its first `length` bytes.

        The descriptor is duplicated; the caller's stays the caller's.

        Raises:
            PopulatedError: mlockall(MCL_FUTURE) is in force: to map the file would fill its holes with zeros.
            LimitError: a limit of the process or machine; the error names it.
        """
        length = os.fstat(fd).st_size if length is None else length
        _check(length, page_size)
        if new_mappings_are_populated(page_size) and (holes := _holes(fd, length, page_size)):
            raise PopulatedError(
                f"mlockall(MCL_FUTURE) is in force: to map this memfd would fill {holes} missing bytes with zeros,"
                " for every process that maps it",
                "Lock with mlockall(MCL_FUTURE | MCL_ONFAULT), or map the memfd before mlockall",
            )
        try:
            own = os.dup(fd)
        except OSError as error:
            raise _refusal(error, length, page_size) from error
        return cls._map(own, length, page_size)

    @classmethod
    def _map(cls, fd: int, length: int, page_size: int, *, new: bool = False) -> Self:
        """Map memory; `fd` belongs to the region. `new`: an empty memfd that nobody else has."""
        try:
            if new:
                os.ftruncate(fd, align_up(length, page_size))
            locked = (new or fd < 0) and page_size == mmap.PAGESIZE and new_mappings_are_populated()
            # In a process that locks its memory, one page is mapped, unlocked, and grown then: that fills nothing.
            first = mmap.PAGESIZE if locked else _length_at_first(length, page_size, fd)
            self = super().__new__(cls, fd, first, flags=_flags(fd, page_size), prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException as error:
            if fd >= 0:
                os.close(fd)
            if isinstance(error, OSError):
                raise _refusal(error, length, page_size) from error
            raise
        if first > length:
            mmap.mmap.resize(self, length)
        self.page_size = page_size
        self.fd = fd
        self._owned = OwnedDescriptor(fd)
        self.monitor = self.reopens = None
        self.never_served = True
        self.withheld = self._inherited = self._adopted = False
        _regions.add(self)
        self._listener = self._note = None
        self._keep = []
        self._find()
        if locked or ((new or fd < 0) and page_size > mmap.PAGESIZE and is_populated(self.address)):
            try:
                self._empty(length)
            except OSError as error:
                # ENOMEM and EPERM as well: more than RLIMIT_MEMLOCK.
                raise limit_error(f"a region of {length} bytes", errno.EAGAIN) or error from error
        return self

    def _empty(self, length: int) -> None:
        """Drop what the kernel has filled the new mapping with. Small pages are locked again, each when it comes."""
        empty_locked(self.address, self.mapped_length, self.fd)
        if self.page_size > mmap.PAGESIZE:  # never swapped; to lock them would fill them again
            return
        super().resize(length)
        self._find()
        if self.fd >= 0:
            os.ftruncate(self.fd, self.mapped_length)
        libc.lock_on_fault(self.address, self.mapped_length)

    def adopt(self, fd: int) -> None:
        """Be shared from now on: `fd`, the region's own, has been mapped in place of private memory."""
        self.fd, self._owned, self._adopted = fd, OwnedDescriptor(fd), True

    def _find(self) -> None:
        if self._adopted:  # mmap.mmap does not know it
            os.ftruncate(self.fd, self.mapped_length)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        if self._note is not None:
            self._note.move(self.address, self.mapped_length)

    @property
    def mapped_length(self) -> int:
        """`len()` rounded up to whole pages: what is really mapped, and what is registered."""
        return align_up(len(self), self.page_size)

    def listen(self, listener: LayoutListener | None) -> None:
        """Have `listener`, which serves the region without layout events, make its layout changes; None: nobody."""
        self._listener = listener

    def annotate(self, note: Note | None) -> None:
        """Have `note` follow the region when it moves, until it is closed; None: none."""
        previous, self._note = self._note, note
        if previous is not None:
            previous.close()

    def keep(self, thing: object) -> None:
        """Keep an object alive for as long as the region is mapped."""
        self._keep.append(thing)

    def bring(self, start: int, length: int) -> None:
        """Have a range (offsets) present, where somebody serves it here. The GIL is released meanwhile.

        Raises:
            SourceError: a page could not be had.
            ClosedError: a page is missing, and the Monitor that served the region was left.
            RuntimeError: this thread runs the engine's loop.
        """
        if not length:  # behind the end there is other memory, or none
            return
        page = start & -mmap.PAGESIZE
        if all(byte & _IN_MEMORY for byte in libc.mincore(self.address + page, start + length - page)):
            return  # 1 us; to ask a pager takes 100 us
        if self.monitor is not None:
            if self.monitor.serves_here:
                self.monitor.prefetch_sync(start, length)
        elif self._listener is not None:  # it was left, and a touch of what is missing is SIGBUS
            first, end = start & -self.page_size, align_up(start + length, self.page_size)
            with Pagemap.open_if_possible() as pagemap:
                if pagemap.missing(self.address + first, end - first, self.fd, self.page_size):
                    raise ClosedError(f"[{start}, {start + length}) is not all there, and its Monitor was left")

    def as_file(self, buffer_size: int = 128 << 10) -> io.BufferedReader:
        """Return a binary file that reads the region, with a position of its own, for one thread.

        What is missing is brought first, without the GIL: an error is raised as by `bring`, where a touch would be
        SIGBUS. The file keeps the region alive, and is no view: after `close` of the region it raises ValueError.

        Args:
            buffer_size: bytes that are brought and copied at once, at least.
        """
        from aiouffd.kernel.region_file import RegionFile  # noqa: PLC0415 - half a millisecond, for few programs

        return io.BufferedReader(RegionFile(self), buffer_size)

    def readable(self) -> bool:
        """Return True: a region can be passed where a binary file is read. Its position is one for all threads."""
        return True

    seekable: ClassVar[Callable[[Region], bool]] = readable
    writable: ClassVar[Callable[[Region], bool]] = readable

    def seek(self, pos: int, whence: Any = os.SEEK_SET) -> int:  # type: ignore[override]  # None until Python 3.13
        """As `mmap.seek`; return the position."""
        super().seek(pos, whence)
        return self.tell()

    def read(self, n: int | None = None) -> bytes:
        """As `mmap.read`. What is missing is brought first: raises as `bring`."""
        at = self.tell()  # other threads may move it
        rest = max(len(self) - at, 0)
        length = rest if n is None or n < 0 else min(n, rest)
        self.bring(at, length)
        data: bytes = self[at : at + length]
        if data:
            super().seek(at + length)
        return data

    def readinto(self, buffer: Any, /) -> int:
        """Copy from the position on into a buffer, as `read` does, and return how many bytes."""
        with memoryview(buffer).cast("B") as target:
            data = self.read(len(target))
            target[: len(data)] = data
        return len(data)

    def madvise(self, option: int, start: int = 0, length: int | None = None) -> None:
        """As `mmap.madvise`. MADV_DONTNEED and MADV_REMOVE empty pages: they read as zeros, not as the source's data.

        Of a shared region MADV_REMOVE does so, for all who map it; MADV_DONTNEED does nothing once it was served.
        They wait for the end of a snapshot, as `resize` does. A RuntimeWarning tells, where a Monitor shows data. After
        it was left, a touch of an emptied page is SIGBUS, as of any that is missing.
        """
        length = len(self) - start if length is None else length
        if option not in (mmap.MADV_DONTNEED, mmap.MADV_REMOVE):
            super().madvise(option, start, length)
            return
        if option == mmap.MADV_DONTNEED and self.fd >= 0 and not (self._adopted or self.never_served):
            return
        if self.monitor is not None and self.monitor.shows_data:
            warnings.warn("emptied pages read as zeros, and not as the source's data", RuntimeWarning, stacklevel=2)
        with _no_snapshot(self.monitor):
            if self._adopted:  # it has been private, and is emptied as it would be
                option, length = mmap.MADV_REMOVE, align_up(length, self.page_size)
            if self._listener is None:
                self._advise(option, start, length)
                return

            def empty(change: LayoutChange) -> None:
                super(Region, self).madvise(option, start, length)
                change.removed(start, length)

            self._listener.change(empty)

    def _advise(self, option: int, start: int, length: int) -> None:
        """As `mmap.madvise`, which keeps the GIL. The kernel waits until a pager has read that pages are removed.

        If that was killed just now, threads of this process have another one started.
        """
        if not 0 <= start < len(self):
            raise ValueError("madvise start out of bounds")
        if length < 0:
            raise ValueError("madvise length invalid")
        with memoryview(self):  # not closed meanwhile
            libc.madvise(self.address + start, min(length, len(self) - start), option)

    def resize(self, newsize: int) -> None:
        """As `mmap.resize`; a mapping that grows may move. What is added reads as zeros.

        A mapping that moves is gone from its old address: a thread, or a signal handler of one, that touches it there
        gets SIGSEGV, as with any mmap. To avoid that, make the region as long as it may become: memory is used for
        pages that are touched, and what lies beyond the end of the source is zeros.

        With `InProcess` and `InThread`, and once a Monitor was left, the same holds for any touch while a region grows.

        Raises:
            BufferError: views of the region exist.
            ClosedError: shared memory, and this process has closed the region's descriptor.
            BusyError: the loop that serves it does not run; or this is its thread, or nobody serves it any more, and
                the last page, which is not whole and must be cleared behind its end, is missing: `await prefetch()` it
                first.
        """
        if not self._may_use_descriptor():
            raise ClosedError("this process has closed the region's descriptor")
        with _no_snapshot(self.monitor):
            if newsize > len(self):
                self._clear_tail()
            if self._listener is None:
                super().resize(newsize)
                self._find()
                return
            self.refuse_views()

            def move(change: LayoutChange) -> None:
                # Without EVENT_REMAP memory that moves is unregistered: missing pages would read as zeros until it is
                # registered again. For that moment nobody can touch it: SIGSEGV, and no wrong bytes.
                if newsize > len(self):  # else nothing moves
                    libc.mprotect(self.address, self.mapped_length, libc.PROT_NONE)
                try:
                    super(Region, self).resize(newsize)
                except BaseException:
                    libc.mprotect(self.address, self.mapped_length, mmap.PROT_READ | mmap.PROT_WRITE)
                    raise
                self._find()
                change.moved(self.address, newsize)
                libc.mprotect(self.address, self.mapped_length, mmap.PROT_READ | mmap.PROT_WRITE)

            self._listener.change(move)

    def refuse_views(self) -> None:
        """Raise BufferError where views exist, which are not to lose their memory."""
        try:
            super().resize(len(self))  # changes nothing
        except BufferError:
            raise BufferError("views of the region exist: memoryviews, arrays or tensors") from None

    def _may_use_descriptor(self) -> bool:
        """Whether it has none, or its own: `mmap.mmap` has a duplicate, which it truncates and closes blindly."""
        return self.fd < 0 or self._owned.intact

    def _clear_tail(self) -> None:
        """Fill what the last page has behind the end with zeros, before the end moves on.

        A region that was cut there has bytes from before, or of the source.
        """
        end, tail = len(self), self.mapped_length - len(self)
        if tail == 0:
            return
        if self._listener is not None and not self._listener.may_wait:
            with Pagemap.open_if_possible() as pagemap:
                page = self.address + self.mapped_length - self.page_size
                if pagemap.missing(page, self.page_size, self.fd, self.page_size):
                    raise BusyError("resize", page, self.page_size, errno.EBUSY)
        ctypes.memset(self.address + end, 0, tail)  # without the GIL

    def close(self) -> None:
        """Unmap the region; not shared memory whose descriptor this process has closed, which stays until it ends.

        In a forked child that did not get it nothing is unmapped: its place is the process's until that ends.

        Raises:
            BusyError: a Monitor serves it: leave that first.
            BufferError: views of it exist.
        """
        if self.closed:
            return
        if self.monitor is not None and not self._inherited:
            raise BusyError("munmap", self.address, len(self), errno.EBUSY)
        length = self.mapped_length
        if self._inherited or not self._may_use_descriptor():
            _never_closed[id(self)] = self
            return
        super().close()
        if self.page_size > mmap.PAGESIZE:
            # mmap.close() calls munmap(2) with len() bytes. hugetlb needs whole huge pages (EINVAL), so that an odd
            # length is still mapped.
            libc.munmap(self.address, length)
        self._owned.close()
        self.fd = -1
        self._listener = None
        self._keep.clear()
        self.annotate(None)

    def __exit__(self, *_: object) -> None:
        """Close the region."""
        self.close()  # that of mmap.mmap unmaps what is served

    @until_exit
    def __del__(self) -> None:
        # A view keeps the region alive, except in a cycle with it.
        if hasattr(self, "_keep"):
            self.monitor = None
            with contextlib.suppress(BufferError):
                self.close()

    def _repr_html_(self) -> str:
        """For notebooks: what it is, and what of it has come."""
        import html  # noqa: PLC0415 - 7 ms, and few programs are notebooks

        from aiouffd.kernel.residency import picture, residency  # noqa: PLC0415 - as well

        return f"<code>{html.escape(repr(self))}</code>" + ("" if self.closed else picture(len(self), residency(self)))

    def __reduce__(self) -> tuple[Callable[..., Region], tuple[Any, ...]]:
        if self.reopens is None:
            raise TypeError(
                "only regions of aiouffd.map and aiouffd.open can be pickled, as what they show, and not with"
                " engine=InProcess(): pass the source of this one, or a copy of its bytes"
            )
        return self.reopens

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} bytes at {self.address:#x}"
        return f"<Region {state}, pages of {self.page_size}{', shared' if self.fd >= 0 else ''}>"


def _no_snapshot(monitor: Any) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if monitor is None else monitor.no_snapshot()


def _check(length: int, page_size: int) -> None:
    for name, value in {"length": length, "page_size": page_size}.items():
        if not isinstance(value, int | SupportsIndex):
            raise TypeError(f"{name}= takes a whole number of bytes, not {value!r:.200}")
    if length <= 0:
        raise ValueError(f"a region has at least one byte, not {length}")
    if page_size < mmap.PAGESIZE or page_size & (page_size - 1):
        raise ValueError(f"page_size is a power of two of at least {mmap.PAGESIZE}, not {page_size}")


def _length_at_first(length: int, page_size: int, fd: int) -> int:
    """Return how much is mapped, to be cut then: only a mapping of whole huge pages begins at one (Linux 6.7)."""
    return align_up(length, HUGE_PAGE) if fd < 0 and length > HUGE_PAGE and page_size == mmap.PAGESIZE else length


def _flags(fd: int, page_size: int) -> int:
    flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if page_size == mmap.PAGESIZE:
        return flags | MAP_NORESERVE
    return flags if fd >= 0 else flags | MAP_HUGETLB | ((page_size.bit_length() - 1) << MAP_HUGE_SHIFT)


def _holes(fd: int, length: int, page_size: int) -> int:
    """Return how many of a file's first `length` bytes lie in holes."""
    if page_size == mmap.PAGESIZE:
        return length - sum(end - start for start, end in data_ranges(fd, length))
    status = os.fstat(fd)  # hugetlbfs has no SEEK_HOLE
    return max(0, status.st_size - status.st_blocks * 512)


def _refusal(error: OSError, length: int, page_size: int) -> OSError | UnsupportedError:
    """Return the error that says why memory could not be mapped."""
    if page_size > mmap.PAGESIZE and error.errno in (errno.ENOMEM, errno.EINVAL, errno.ENODEV, errno.ENOSYS):
        return no_huge_pages(length, page_size)
    return limit_error(f"a region of {length} bytes", error.errno or 0) or error


def _reserve(region: Region) -> None:
    """Keep what this forked child did not get from becoming other memory: a touch is SIGSEGV.

    What has come there since the fork is not unmapped by the region.
    """
    region._inherited = True  # noqa: SLF001 - its own
    start, end = region.address, region.address + region.mapped_length
    flags = _flags(-1, mmap.PAGESIZE) | _MAP_FIXED_NOREPLACE
    gaps = [Range(start, end - start)]
    for _ in range(_RESERVED_AGAIN):
        try:
            for gap in gaps:
                libc.mmap_fixed(gap.start, gap.length, libc.PROT_NONE, flags)
            break
        except OSError:  # it got some pages, or they are other memory by now, as this thread's own; or RLIMIT_AS
            gaps = list(RangeSet(mapped(start, end - start)).gaps(start, end))


def _in_child() -> None:
    for region in list(_regions):
        if region.withheld and not region.closed:
            _reserve(region)


os.register_at_fork(after_in_child=_in_child)
