"""Addresses of buffers, what is mapped where, and memory that travels between processes as a descriptor."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import re
from array import array
from typing import TYPE_CHECKING, Any, Final, Self

from aiouffd import native
from aiouffd.kernel import files, libc
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.ranges import Range, align_up

if TYPE_CHECKING:
    from collections.abc import Buffer, Iterator, Sequence  # type: ignore[attr-defined,unused-ignore]

__all__ = [
    "MAP_NORESERVE",
    "ProcessMemory",
    "SealedMemory",
    "address_of",
    "map_file",
    "mapped",
    "mappings_of",
    "populated",
    "read_parts",
    "unreadable",
    "unshare_memory",
    "write_parts",
    "zero_blocks",
    "zeros",
]


MAP_NORESERVE: Final = 0x4000


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` of CPython's buffer protocol."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_PyBuffer)]
_release_buffer.restype = None


def read_parts(fd: int, parts: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
    """Return (offset, bytes) of parts (offset, length) of a file, by one call. Raises OSError."""
    if native.reason():
        return [(offset, os.pread(fd, length, offset)) for offset, length in parts]
    words, buffer = array("Q", [word for part in parts for word in part]), bytearray(sum(length for _, length in parts))
    address, _ = words.buffer_info()
    arguments = ctypes.c_void_p(address), len(parts), ctypes.c_void_p(address_of(buffer))
    done, at = native.library().aiouffd_reads(fd, *arguments), 0
    found = list[tuple[int, bytes]]()
    for offset, length in parts[:done]:
        found.append((offset, bytes(buffer[at : at + length])))
        at += length
    return found + [(offset, os.pread(fd, length, offset)) for offset, length in parts[done:]]


def write_parts(fd: int, parts: Sequence[tuple[int, Any]]) -> int:
    """Write parts (offset, bytes) of a file by one call; return how many were written, before the first that was not.

    Where that one was written in part, the rest of it is anybody's to write. No buffer but bytes is written.
    """
    if native.reason() or not all(isinstance(data, bytes) for _, data in parts):
        return 0
    words = array("Q", [word for offset, data in parts for word in (offset, len(data))])
    pointers, (address, _) = (ctypes.c_char_p * len(parts))(*[data for _, data in parts]), words.buffer_info()
    return int(native.library().aiouffd_writes(fd, ctypes.c_void_p(address), len(parts), pointers))


def address_of(buffer: Any) -> int:
    """Return the address of a contiguous buffer's first byte, read-only or not.

    The address is valid as long as the caller keeps the object alive and does not resize it.
    """
    view = _PyBuffer()
    _get_buffer(buffer, view, 0)  # PyBUF_SIMPLE: contiguous, or BufferError
    address: int = view.buf or 0
    _release_buffer(view)
    return address


@functools.cache
def zeros(size: int) -> mmap.mmap:
    """Return zeros that cost no memory: nobody writes to them, so that the kernel maps its zero page everywhere."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def populated(size: int) -> mmap.mmap:
    """Return memory that is there already: page by page, at the first writes, it would take five times as long."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


_blank = functools.cache(bytes)  # as `zeros`, for methods of bytes

_memcmp = ctypes.PyDLL(None).memcmp  # PyDLL: to release the GIL would cost more than the comparison
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def zero_blocks(view: memoryview, block: int) -> list[int]:
    """Return the offsets of the blocks of a buffer that hold nothing but zeros. The last block may be shorter.

    A block whose first or last byte is not zero costs nothing more: the last one has the exponent of a number. Nor does
    a buffer of less than a block cost an address.

    Args:
        view: contiguous bytes.
        block: bytes.
    """
    found: list[int] = []
    if 0 < len(view) < block:
        return found if view[0] or view[-1] or not _blank(block).startswith(view) else [0]
    firsts = view[::block].tobytes()
    if firsts.find(0) < 0:
        return found
    lasts = int.from_bytes(view[block - 1 :: block].tobytes(), "little")
    firsts = (int.from_bytes(firsts, "little") | lasts).to_bytes(len(firsts), "little")
    index = firsts.find(0)
    if index < 0:
        return found
    address, reference = address_of(view), address_of(zeros(block))
    while index >= 0:
        begin = index * block
        if not _memcmp(address + begin, reference, min(block, len(view) - begin)):
            found.append(begin)
        index = firsts.find(0, index + 1)
    return found


@functools.cache
def unreadable() -> mmap.mmap:
    """Return a page that cannot be read: a COPY from it changes nothing, and returns what the kernel checks before."""
    return mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)


def _mappings() -> Iterator[tuple[Range, bytes, bytes]]:
    """Yield the mappings of this process: range, access (as "rw-p") and inode ("0": no file)."""
    for line in files.read("/proc/self/maps").splitlines():  # a path may have any bytes
        bounds, access, _, _, inode, *_ = line.split()
        start, end = (int(bound, 16) for bound in bounds.split(b"-"))
        yield Range.between(start, end), access, inode


def mapped(start: int, length: int) -> list[Range]:
    """Return the parts of [start, start + length) that are mapped; all of it where there is no /proc."""
    try:
        bounds = [(max(item.start, start), min(item.end, start + length)) for item, _, _ in _mappings()]
    except OSError:
        return [Range(start, length)]
    return [Range.between(low, high) for low, high in bounds if low < high]


def mappings_of(inode: int) -> list[Range]:
    """Return the shared mappings of a file in this process, by its inode; none where there is no /proc."""
    try:
        return [item for item, access, number in _mappings() if access.endswith(b"s") and int(number) == inode]
    except OSError:
        return []


def unshare_memory() -> None:
    """Copy now the memory that this process shares with its parent since the fork, and not at its first writes.

    Those would cost 3 us a page. Only anonymous memory is copied: of that mincore says what this process has, but of a
    file what any process has. Before Linux 5.14 nothing is copied.
    """
    for item, access, inode in _mappings():
        if access == b"rw-p" and inode == b"0":
            with contextlib.suppress(OSError):
                for run in re.finditer(b"\1+", libc.mincore(item.start, item.length)):
                    length = (run.end() - run.start()) * mmap.PAGESIZE
                    libc.madvise(item.start + run.start() * mmap.PAGESIZE, length, libc.MADV_POPULATE_WRITE)


def map_file(fd: int, length: int, access: int) -> mmap.mmap:
    """Map the first bytes of a file, as `mmap.mmap(fd, length, access=access)` does, and keep no descriptor.

    Before Python 3.13 `mmap.mmap` keeps a duplicate, and closes what has its number in the end, whoever's that is.

    Args:
        fd: stays the caller's.
        length: in bytes, at least one.
        access: mmap.ACCESS_READ; ACCESS_WRITE: what is written goes to the file; ACCESS_COPY: it does not.
    """
    kind = mmap.MAP_PRIVATE if access == mmap.ACCESS_COPY else mmap.MAP_SHARED
    protection = mmap.PROT_READ | (0 if access == mmap.ACCESS_READ else mmap.PROT_WRITE)
    # Memory, in whose place the file comes. What is private and writable counts for RLIMIT_DATA, if for a moment only.
    place = mmap.MAP_SHARED if access == mmap.ACCESS_WRITE else mmap.MAP_PRIVATE
    mapping = mmap.mmap(-1, length, flags=place | mmap.MAP_ANONYMOUS | MAP_NORESERVE, prot=protection)
    libc.mmap_fixed(address_of(mapping), length, protection, kind, fd)
    return mapping


class ProcessMemory(OwnedDescriptor):
    """The memory of a process, read through a descriptor: a page that is missing is told, and causes no fault.

    Args:
        fd: belongs to this object. Of /proc/self/mem, which its process has opened: the kernel checks then who may read
            it, and not later. Or of the memfd that it maps.
        start: the address that offset 0 is at; None: it is a memfd, with offsets of its own.
    """

    def __init__(self, fd: int, start: int | None = None) -> None:
        super().__init__(fd)
        self.start: int = start or 0
        self.file: int = fd if start is None else -1

    @classmethod
    def own(cls, start: int) -> Self:
        """Open that of this process. Raises OSError where there is no /proc."""
        return cls(os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC), start)

    @classmethod
    def all_if_possible(cls) -> Self | None:
        """Open that of this process, by addresses; None: there is no /proc."""
        try:
            return cls.own(0)
        except OSError:
            return None

    def page(self, offset: int, length: int) -> bytes:
        """Return the bytes of one page; fewer where it is missing. From any thread."""
        try:
            data = os.pread(self._fd, length, self.start + offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""
        return data.ljust(length, b"\0") if data and self.file >= 0 else data  # a file may end within its last page

    def read_into(self, view: memoryview, offset: int) -> list[int]:
        """Fill a buffer of zeros with the bytes from an offset on, both page-aligned; return where pages are missing.

        From any thread. A hole of a memfd reads as zeros, as does what is behind its end in its last page.
        """
        done, missing = 0, []
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done:]], self.start + offset + done)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                got = 0
            if not got:
                missing.append(offset + done)
                got = mmap.PAGESIZE
            done += align_up(got, mmap.PAGESIZE)
        return missing


class SealedMemory:
    """Bytes in a memfd that nobody can write, grow or shrink any more (F_SEAL_*, Linux 3.17).

    It travels to the pager as a descriptor, without a copy. A process that maps it can rely on its size (no SIGBUS)
    and on its content. The descriptor belongs to this object.
    """

    def __init__(self, fd: int) -> None:
        self.fd: int = fd
        self._owned = OwnedDescriptor(fd)
        self.size: int = os.fstat(fd).st_size
        # A private mapping of a sealed file shares its pages: reading costs no memory. The mapping is writable, since
        # ctypes gives the address of a writable buffer at a fraction of the cost.
        self.map: mmap.mmap | None = map_file(fd, self.size, mmap.ACCESS_COPY) if self.size else None

    @classmethod
    def from_buffer(cls, data: Buffer, name: str = "aiouffd") -> SealedMemory:
        """Copy `data` into a new sealed memfd."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            view = memoryview(data).cast("B")
            done = 0
            while done < len(view):
                done += os.write(fd, view[done : done + (1 << 30)])
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    def close(self) -> None:
        """Close the descriptor. The mapping ends with its last view."""
        self._owned.close()
        self.fd = -1
