"""Memory of every kind that a test can be about: how it is mapped, seen a second time, and emptied.

What is read and written here is read and written through addresses, without the GIL: the mapping may move, and a
Python object that stands for it would not know.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from pattern import PAGE, peek

from aiouffd import Region
from aiouffd.kernel import libc
from aiouffd.kernel.memory import address_of
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

HUGE = 2 << 20
TMPFS = "/dev/shm"

MAP_NORESERVE = 0x4000
MAP_HUGETLB = 0x40000
MAP_FIXED = 0x10
PROT_NONE = 0
KEEP_SIZE, PUNCH_HOLE = 1, 2

IPC_RMID = 0

SMALL = ("anonymous", "anonymous-shared", "shmem", "shmem-private", "tmpfs")
LARGE = ("hugetlb", "hugetlb-private")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
_libc.shmat.restype = ctypes.c_void_p
_libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_libc.shmctl.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]

_FAILED = ctypes.c_void_p(-1).value


def poke(address: int, data: bytes) -> None:
    """Write memory without holding the GIL, as a native thread would."""
    _libc.memcpy(address, data, len(data))


def map_at(address: int, length: int, flags: int, fd: int = -1) -> None:
    """Map at `address`, in place of whatever is there; `flags` say of what kind.

    Raises:
        OSError: the kernel refused.
    """
    if _libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags | MAP_FIXED, fd, 0) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def place(length: int, alignment: int = HUGE) -> int:
    """Return an aligned address from which on `length` bytes are free to be mapped over; they stay taken."""
    start = _libc.mmap(None, length + alignment, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if start in (None, _FAILED):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return align_up(start, alignment)


@attrs.define(eq=False)
class Memory:
    """A mapping.

    Attributes:
        address: of its first byte.
        pages: how many.
        page_size: in bytes.
        shared: another process that maps it sees what is written.
        fd: of the file behind it, or -1.
        owner: keeps it mapped.
    """

    address: int
    pages: int
    page_size: int
    shared: bool
    fd: int
    owner: Any

    @property
    def length(self) -> int:
        """In bytes."""
        return self.pages * self.page_size

    def page(self, number: int) -> int:
        """Return the address of a page."""
        return self.address + number * self.page_size

    def addresses(self) -> Iterable[int]:
        """Return the address of every page."""
        return range(self.address, self.address + self.length, self.page_size)

    def read(self, page: int) -> bytes:
        """Return a whole page's bytes."""
        return peek(self.page(page), self.page_size)

    def alias(self) -> int:
        """Map the same memory once more, and return where: only what is shared has a second place."""
        if self.fd < 0:  # of old length 0, mremap(2) leaves the mapping and makes another of the same pages
            return libc.mremap(self.address, 0, self.length, libc.MREMAP_MAYMOVE)
        other = mmap.mmap(self.fd, self.length)
        self.owner = (self.owner, other)
        return address_of(other)

    def empty(self) -> None:
        """Give its pages back: a file's as well, or they would be there at the next touch."""
        libc.madvise(self.address, self.length, mmap.MADV_REMOVE if self.shared else mmap.MADV_DONTNEED)
        if not self.shared and self.fd >= 0:  # a private mapping may not remove, yet what it has read the file has
            self.punch(0, self.length)

    def punch(self, offset: int, length: int) -> None:
        """Make a hole in the file."""
        if _libc.fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _of_mmap(area: mmap.mmap, pages: int, page_size: int, *, shared: bool, fd: int = -1) -> Memory:
    return Memory(address_of(area), pages, page_size, shared, fd, area)


def _anonymous(pages: int) -> Memory:
    return _of_mmap(Region(pages * PAGE), pages, PAGE, shared=False)


def _anonymous_shared(pages: int) -> Memory:
    area = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return _of_mmap(area, pages, PAGE, shared=True)


def _memfd(pages: int) -> Memory:
    region = Region(pages * PAGE, shared=True)
    return _of_mmap(region, pages, PAGE, shared=True, fd=region.fd)


def _file(fd: int, pages: int, page_size: int, *, shared: bool) -> Memory:
    if os.fstat(fd).st_size < pages * page_size:
        os.ftruncate(fd, pages * page_size)
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    return _of_mmap(mmap.mmap(fd, pages * page_size, flags=flags), pages, page_size, shared=shared, fd=fd)


def _memfd_private(pages: int) -> Memory:
    return _file(os.memfd_create("private"), pages, PAGE, shared=False)


def _tmpfs(pages: int) -> Memory:
    return _file(os.open(TMPFS, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC), pages, PAGE, shared=True)


def _tmpfs_private(pages: int) -> Memory:
    return _file(os.open(TMPFS, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC), pages, PAGE, shared=False)


def _disk(pages: int, *, shared: bool) -> Memory:
    return _file(os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC), pages, PAGE, shared=shared)


def _dev_zero(pages: int, *, shared: bool) -> Memory:
    fd = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
    try:
        area = mmap.mmap(fd, pages * PAGE, flags=mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
    finally:
        os.close(fd)
    return _of_mmap(area, pages, PAGE, shared=shared)


def _system_v(pages: int) -> Memory:
    number = _libc.shmget(0, pages * PAGE, 0o600)  # IPC_PRIVATE
    address = _libc.shmat(number, None, 0)
    _libc.shmctl(number, IPC_RMID, None)  # it goes with its last mapping, so with this process
    if number < 0 or address in (None, _FAILED):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return Memory(address, pages, PAGE, True, -1, None)


def _hugetlb(pages: int) -> Memory:
    region = Region(pages * HUGE, page_size=HUGE, shared=True)
    return _of_mmap(region, pages, HUGE, shared=True, fd=region.fd)


def _hugetlb_private(pages: int) -> Memory:
    return _of_mmap(Region(pages * HUGE, page_size=HUGE), pages, HUGE, shared=False)


def _hugetlb_memfd_private(pages: int) -> Memory:
    return _file(os.memfd_create("private", os.MFD_HUGETLB | os.MFD_HUGE_2MB), pages, HUGE, shared=False)


MAKERS: dict[str, Callable[[int], Memory]] = {
    "anonymous": _anonymous,
    "anonymous-shared": _anonymous_shared,
    "shmem": _memfd,
    "shmem-private": _memfd_private,
    "tmpfs": _tmpfs,
    "tmpfs-private": _tmpfs_private,
    "dev-zero": lambda pages: _dev_zero(pages, shared=True),
    "dev-zero-private": lambda pages: _dev_zero(pages, shared=False),
    "system-v": _system_v,
    "disk": lambda pages: _disk(pages, shared=True),
    "disk-private": lambda pages: _disk(pages, shared=False),
    "hugetlb": _hugetlb,
    "hugetlb-private": _hugetlb_private,
    "hugetlb-memfd-private": _hugetlb_memfd_private,
}


def memory(kind: str, pages: int) -> Memory:
    """Map new memory of a kind, a name of `MAKERS`."""
    return MAKERS[kind](pages)


def on(case: str, kinds: Sequence[str]) -> pytest.MarkDecorator:
    """Make a test one for each kind of memory, named as the kernel's selftest names it: `wp-fork-on-shmem`."""
    params = [pytest.param(kind, id=f"{case}-on-{kind}") for kind in kinds]
    return pytest.mark.parametrize("kind", params, indirect=True)


def pages_of(kind: str, small: int = 64) -> int:
    """Return how many pages to use: huge ones are few, and a forked child may need as many again."""
    return 2 if kind.startswith("hugetlb") else small
