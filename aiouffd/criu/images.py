"""CRIU's image files: which pages a checkpointed process had, and where they are kept.

A directory of images has for each process `mm-PID.img` (its mappings) and `pagemap-PID.img` (runs of pages), which
names a `pages-ID.img` (the bytes of those runs that are marked PRESENT, one behind the other). Runs marked PARENT lie
in the images of an earlier checkpoint, to which a symbolic link `parent` leads; runs marked LAZY and not PRESENT were
left with the page server of `criu dump --lazy-pages`.

An image is two u32 (one for all images, one for the kind), then messages, each behind its length as u32. A message is
in the encoding of protocol buffers: few fields of it are wanted here, so a decoder of our own does.
"""

from __future__ import annotations

import enum
import os
import stat
import struct
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from aiouffd.errors import HandoffError
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["REMOTE", "PageFlag", "Run", "TaskImage", "read_task"]

PAGE_SIZE = 4096
REMOTE = -1
"""In place of an offset: the bytes are not in these images but with a page server."""

_COMMON_MAGIC = 0x54564319
_PAGEMAP_MAGIC = 0x56084025
_MM_MAGIC = 0x57492820
_MAX_FILE = 256 << 20
"""An entry of a pagemap is 8 to 24 bytes: ten million runs."""
_MAX_MAPPINGS = 1 << 20
"""vm.max_map_count is 65530, and a dump of more would be a feat."""
_ADDRESS_BITS = 57
"""Of user space on x86-64 with five levels of page tables: 56, and one for other architectures."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class PageFlag(enum.IntFlag):
    """Where a run of pages is, as its entry in the pagemap says."""

    PARENT = 1
    LAZY = 2
    PRESENT = 4


@attrs.frozen
class Run:
    """Pages that lie behind each other, in the process as in the file.

    Attributes:
        address: in the process, when it was dumped.
        length: in bytes.
        file: index of the file in `TaskImage.files`, or `REMOTE`.
        offset: in that file, or `REMOTE`.
        flags: of the process's own entry, also where the bytes are a parent's.
    """

    address: int
    length: int
    file: int
    offset: int
    flags: PageFlag

    @property
    def end(self) -> int:
        """First address behind the run."""
        return self.address + self.length

    @property
    def lazy(self) -> bool:
        """Whether CRIU leaves the run to the daemon; what is not lazy it restores itself."""
        return PageFlag.LAZY in self.flags

    def part(self, start: int, end: int) -> Run:
        """Return the pages [start, end) of the run."""
        offset = self.offset if self.offset == REMOTE else self.offset + start - self.address
        return Run(start, end - start, self.file, offset, self.flags)


@attrs.frozen
class TaskImage:
    """The memory of one process, as it was dumped.

    Attributes:
        pid: as in the names of the images: in the outermost pid namespace that was dumped.
        runs: all its private pages, in order of address.
        mappings: the bounds of its mappings, in order of address.
        files: what `Run.file` counts.
    """

    pid: int
    runs: tuple[Run, ...]
    mappings: tuple[Range, ...]
    files: tuple[Path, ...]

    def lazy(self) -> Iterator[Run]:
        """Yield what the daemon has to bring, cut at the bounds of mappings: a COPY must not cross one."""
        mappings = self.mappings
        index = 0
        for run in self.runs:
            if not run.lazy:
                continue
            start = run.address
            while start < run.end:
                while mappings[index].end <= start:
                    index += 1
                end = min(run.end, mappings[index].end)
                yield run.part(start, end)
                start = end


def read_task(directory: str | os.PathLike[str], pid: int) -> TaskImage:
    """Read the images of one process.

    Blocks on the disk: metadata only, no pages are read.

    Args:
        directory: where the images are.
        pid: as CRIU names the process.

    Raises:
        HandoffError: an image is missing, not readable, or not what CRIU writes; it names the file.
    """
    directory = Path(directory)
    mappings = _read_mappings(directory / f"mm-{pid}.img")
    layers = _read_layers(directory, pid)
    runs = tuple(_resolve(layers, layers[0].runs, 0))
    _covered(layers[0].path, runs, mappings)
    return TaskImage(pid, runs, mappings, tuple(layer.pages for layer in layers))


# The file format


def _wrong(path: Path, reason: str) -> HandoffError:
    return HandoffError(str(path), reason)


def _read(path: Path) -> bytes:
    """Return a regular file of a bounded size, whole."""
    try:
        with open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _wrong(path, "is not a regular file")
            if status.st_size > _MAX_FILE:
                raise _wrong(path, f"has {status.st_size} bytes; more than {_MAX_FILE} are not an image")
            return file.read(_MAX_FILE)
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from error


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # does not wait for the writer of a FIFO


def _messages(path: Path, magic: int) -> Iterator[memoryview]:
    data = memoryview(_read(path))
    if len(data) < 8:
        raise _wrong(path, f"is no image: it has {len(data)} bytes")
    for place, expected in ((0, _COMMON_MAGIC), (4, magic)):
        (found,) = _U32.unpack_from(data, place)
        if found != expected:
            raise _wrong(path, f"is no such image: at {place} it has {found:#010x}, not {expected:#010x}")
    at = 8
    while at < len(data):
        if len(data) - at < 4:
            raise _wrong(path, f"ends at {len(data)} within the length of a message")
        (length,) = _U32.unpack_from(data, at)
        at += 4
        if length > len(data) - at:
            raise _wrong(path, f"ends at {len(data)} within a message of {length} bytes at {at}")
        yield data[at : at + length]
        at += length


def _fields(path: Path, message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of the fields of a message: an int, or the bytes of what has a length."""
    at = 0
    while at < len(message):
        key, at = _varint(path, message, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise _wrong(path, "has a field with the number 0")
        if kind == 0:
            value, at = _varint(path, message, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(path, message, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _wrong(path, f"has a field {number} of the unknown kind {kind}")
        if length > len(message) - at:
            raise _wrong(path, f"has a field {number} of {length} bytes where {len(message) - at} are left")
        piece = message[at : at + length]
        at += length
        yield number, piece if kind == 2 else (_U64 if kind == 1 else _U32).unpack(piece)[0]


def _varint(path: Path, message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise _wrong(path, "ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                raise _wrong(path, "has a number of more than 64 bits")
            return value, at
        shift += 7
        if shift > 63:
            raise _wrong(path, "has a number of more than 64 bits")


def _numbers(path: Path, message: memoryview) -> dict[int, int]:
    """Return the fields that are numbers; of a repeated one the last counts, as protocol buffers have it."""
    return {number: value for number, value in _fields(path, message) if isinstance(value, int)}


def _span(path: Path, what: str, start: int, length: int) -> None:
    if start % PAGE_SIZE or length % PAGE_SIZE or length <= 0 or start + length > 1 << _ADDRESS_BITS:
        raise _wrong(path, f"{what} [{start:#x}, {start + length:#x}) is no range of pages in an address space")


# The images


@attrs.frozen
class _Layer:
    """One directory's part: the pagemap, and the file that its PRESENT runs are in. `file` is still 0 in all runs."""

    path: Path
    pages: Path
    runs: list[Run]
    starts: list[int]


def _read_mappings(path: Path) -> tuple[Range, ...]:
    messages = list(_messages(path, _MM_MAGIC))
    if len(messages) != 1:
        raise _wrong(path, f"has {len(messages)} messages, not one")
    found: list[Range] = []
    for number, value in _fields(path, messages[0]):
        if number != 14:
            continue
        if isinstance(value, int):
            raise _wrong(path, "has a mapping that is a number")
        bounds = _numbers(path, value)
        start, end = bounds.get(1), bounds.get(2)
        if start is None or end is None:
            raise _wrong(path, "has a mapping without bounds")
        if start >= 1 << (_ADDRESS_BITS - 1):
            continue  # [vsyscall], which has the highest addresses
        _span(path, "the mapping", start, end - start)
        if found and start < found[-1].end:
            raise _wrong(path, f"the mapping at {start:#x} begins before the end of the one before it")
        found.append(Range(start, end - start))
        if len(found) > _MAX_MAPPINGS:
            raise _wrong(path, f"has more than {_MAX_MAPPINGS} mappings")
    return tuple(found)


def _read_layers(directory: Path, pid: int) -> list[_Layer]:
    """Read the process's pagemap here and in all parents, the youngest first."""
    layers = [_read_layer(directory, pid)]
    seen = {directory.resolve()}
    while any(PageFlag.PARENT in run.flags for run in layers[-1].runs):
        link = directory / "parent"
        if not os.path.lexists(link):
            raise _wrong(layers[-1].path, "has pages in a parent image, and there is no link `parent`")
        try:
            directory = link.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: of Python below 3.13, where links lead in a circle
            raise _wrong(link, f"leads nowhere: {error}") from error
        if directory in seen:
            raise _wrong(link, "leads back to images that it was reached from")
        seen.add(directory)
        layers.append(_read_layer(directory, pid))
    return layers


def _read_layer(directory: Path, pid: int) -> _Layer:
    path = directory / f"pagemap-{pid}.img"
    messages = _messages(path, _PAGEMAP_MAGIC)
    head = next(messages, None)
    name = None if head is None else _numbers(path, head).get(1)
    if name is None or name >= 1 << 32:
        raise _wrong(path, "does not say which file has its pages")
    runs: list[Run] = []
    at = 0
    for message in messages:
        entry = _numbers(path, message)
        address = entry.get(1)
        count = entry.get(5, entry.get(2))  # from CRIU 4.2 on in 64 bits
        if address is None or count is None:
            raise _wrong(path, "has an entry without an address or a number of pages")
        # Images before there were flags have `in_parent`, or nothing where the pages are present.
        flags = PageFlag(entry[4] & 7 if 4 in entry else 0 if entry.get(3) else 4)
        if entry.get(3):
            flags |= PageFlag.PARENT
        length = count * PAGE_SIZE
        _span(path, "the entry", address, length)
        if runs and address < runs[-1].end:
            raise _wrong(path, f"the entry at {address:#x} begins before the end of the one before it")
        if not flags:
            raise _wrong(path, f"the entry at {address:#x} has no flag that says where its pages are")
        offset = REMOTE
        if PageFlag.PRESENT in flags:
            offset = at
            at += length
        elif PageFlag.PARENT not in flags and PageFlag.LAZY not in flags:
            raise _wrong(path, f"the entry at {address:#x} is nowhere")
        runs.append(Run(address, length, 0, offset, flags))
    pages = directory / f"pages-{name}.img"
    try:
        size = os.stat(pages).st_size if at else 0  # noqa: PTH116 - as os.open above
    except OSError as error:
        raise _wrong(pages, f"cannot be read: {error.strerror}") from error
    if size < at:
        raise _wrong(pages, f"has {size} bytes; {path.name} needs {at}")
    return _Layer(path, pages, runs, [run.address for run in runs])


def _resolve(layers: list[_Layer], runs: Iterable[Run], depth: int) -> Iterator[Run]:
    """Yield the runs with the file and the offset that they really have."""
    for run in runs:
        if PageFlag.PARENT not in run.flags:
            yield attrs.evolve(run, file=REMOTE if run.offset == REMOTE else depth)
        else:
            for piece in _resolve(layers, _cover(layers[depth + 1], run), depth + 1):
                yield attrs.evolve(piece, flags=run.flags)


def _cover(layer: _Layer, wanted: Run) -> Iterator[Run]:
    """Yield the parts of a parent's runs that cover one of a child's."""
    start = wanted.address
    index = bisect_right(layer.starts, start) - 1
    while start < wanted.end:
        run = layer.runs[index] if 0 <= index < len(layer.runs) else None
        if run is None or not run.address <= start < run.end:
            raise _wrong(layer.path, f"has no page at {start:#x}, which a later image has left to it")
        if run.offset == REMOTE and PageFlag.PARENT not in run.flags:
            raise _wrong(layer.path, f"has not the page at {start:#x}, which a later image has left to it")
        end = min(wanted.end, run.end)
        yield run.part(start, end)
        start = end
        index += 1


def _covered(path: Path, runs: tuple[Run, ...], mappings: tuple[Range, ...]) -> None:
    """See that each lazy page lies in a mapping."""
    index = 0
    for run in runs:
        start = run.address
        while run.lazy and start < run.end:
            while index < len(mappings) and mappings[index].end <= start:
                index += 1
            if index == len(mappings) or start < mappings[index].start:
                raise _wrong(path, f"has a lazy page at {start:#x}, where the process has no mapping")
            start = min(run.end, mappings[index].end)
