"""CRIU's image files: which pages a checkpointed process had, and where their bytes are.

A directory of images has two files for each process: `mm-PID.img` (its mappings) and `pagemap-PID.img` (its runs of
pages). The pagemap names a `pages-ID.img`, which has the bytes of all runs that are marked PRESENT, one run behind the
other. Runs marked PARENT are in the images of an earlier checkpoint; the symbolic link `parent` leads to them. Runs
marked LAZY but not PRESENT stayed with the page server of `criu dump --lazy-pages`.

CRIU counts in pages of the machine that it runs on.
"""

from __future__ import annotations

import enum
import mmap
import os
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from aiouffd.criu.image_file import fields, invalid, messages, numbers
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["REMOTE", "PageFlag", "PageRun", "TaskImage", "read_task"]

REMOTE = -1
"""In place of a file and an offset: the page server has the bytes."""

_PAGEMAP_MAGIC = 0x56084025
_MM_MAGIC = 0x57492820
_WIDE_COUNT = 5
"""The field of an entry with the number of pages in 64 bits. CRIU writes it since version 4.2, beside field 2."""
_MAX_MAPPINGS = 1 << 20
"""Far more than a process can have: the default of vm.max_map_count is 65530."""
_ADDRESS_BITS = 57
"""User space has 56 bits on x86-64 with five levels of page tables; the limit leaves one more for others."""


class PageFlag(enum.IntFlag):
    """Where a run of pages is, by its entry in the pagemap."""

    PARENT = 1
    LAZY = 2
    PRESENT = 4


@attrs.frozen
class PageRun:
    """Pages that are contiguous in the process and in the file.

    Attributes:
        address: in the process, at the time of the dump.
        length: in bytes, whole pages.
        file: index in `TaskImage.files`, or `REMOTE`.
        offset: in that file, in bytes, or `REMOTE`.
        flags: of the process's own entry, also where a parent has the bytes.
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
        """Whether CRIU leaves the run to the daemon. CRIU restores all others itself."""
        return PageFlag.LAZY in self.flags

    def part(self, start: int, end: int) -> PageRun:
        """Return the pages [start, end) of the run."""
        offset = self.offset if self.offset == REMOTE else self.offset + start - self.address
        return PageRun(start, end - start, self.file, offset, self.flags)


@attrs.frozen
class TaskImage:
    """The memory of one process at the time of the dump.

    Attributes:
        pid: as in the names of the images: in the outermost pid namespace that was dumped.
        runs: all its private pages, ordered by address.
        mappings: its mappings, ordered by address.
        files: the files that `PageRun.file` is an index of.
        wide_counts: whether the pagemap has the numbers of pages in 64 bits: CRIU 4.2 or later wrote it. None: it
            has no entry that would tell.
    """

    pid: int
    runs: tuple[PageRun, ...]
    mappings: tuple[Range, ...]
    files: tuple[Path, ...]
    wide_counts: bool | None

    def lazy(self) -> Iterator[PageRun]:
        """Yield the lazy runs, split at the bounds of mappings: a COPY must not cross one."""
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

    Blocks on the disk. Reads metadata only, no pages.

    Args:
        directory: of the images.
        pid: as CRIU names the process.

    Raises:
        HandoffError: an image is missing, cannot be read, or is not valid. The error names the file.
    """
    directory = Path(directory)
    mappings = _read_mappings(directory / f"mm-{pid}.img")
    layers = _read_layers(directory, pid)
    runs = tuple(_resolve(layers, layers[0].runs, 0))
    _require_mapped(layers[0].path, runs, mappings)
    return TaskImage(pid, runs, mappings, tuple(layer.pages for layer in layers), layers[0].wide_counts)


@attrs.frozen
class _Layer:
    """The pagemap of one directory, and the file with the bytes of its PRESENT runs. `file` is 0 in all runs yet."""

    path: Path
    pages: Path
    runs: list[PageRun]
    starts: list[int]
    wide_counts: bool | None


def _require_pages(path: Path, what: str, start: int, length: int) -> None:
    page = mmap.PAGESIZE
    if start % page or length % page or length <= 0 or start + length > 1 << _ADDRESS_BITS:
        raise invalid(path, f"{what} [{start:#x}, {start + length:#x}) is no range of pages in an address space")


def _read_mappings(path: Path) -> tuple[Range, ...]:
    found_messages = list(messages(path, _MM_MAGIC))
    if len(found_messages) != 1:
        raise invalid(path, f"has {len(found_messages)} messages, not one")
    found: list[Range] = []
    for number, value in fields(path, found_messages[0]):
        if number != 14:
            continue
        if isinstance(value, int):
            raise invalid(path, "has a mapping that is a number")
        bounds = numbers(path, value)
        start, end = bounds.get(1), bounds.get(2)
        if start is None or end is None:
            raise invalid(path, "has a mapping without bounds")
        if start >= 1 << (_ADDRESS_BITS - 1):
            continue  # [vsyscall], at the highest addresses
        _require_pages(path, "the mapping", start, end - start)
        if found and start < found[-1].end:
            raise invalid(path, f"the mapping at {start:#x} begins before the end of the one before it")
        try:
            found.append(Range.between(start, end))
        except ValueError as error:
            raise invalid(path, f"has a mapping that cannot be: {error}") from error
        if len(found) > _MAX_MAPPINGS:
            raise invalid(path, f"has more than {_MAX_MAPPINGS} mappings")
    return tuple(found)


def _read_layers(directory: Path, pid: int) -> list[_Layer]:
    """Read the process's pagemap here and in all parents, the newest first."""
    layers = [_read_layer(directory, pid)]
    seen = {directory.resolve()}
    while any(PageFlag.PARENT in run.flags for run in layers[-1].runs):
        link = directory / "parent"
        if not os.path.lexists(link):
            raise invalid(layers[-1].path, "has pages in a parent image, but there is no link `parent`")
        try:
            directory = link.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # Python before 3.13 raises RuntimeError for a loop of links
            raise invalid(link, f"leads nowhere: {error}") from error
        if directory in seen:
            raise invalid(link, "leads back to images that it was reached from")
        seen.add(directory)
        layers.append(_read_layer(directory, pid))
    return layers


def _read_layer(directory: Path, pid: int) -> _Layer:
    path = directory / f"pagemap-{pid}.img"
    entries = messages(path, _PAGEMAP_MAGIC)
    head = next(entries, None)
    name = None if head is None else numbers(path, head).get(1)
    if name is None or name >= 1 << 32:
        raise invalid(path, "does not name the file with its pages")
    runs: list[PageRun] = []
    wide_counts = None
    size = 0
    for message in entries:
        entry = numbers(path, message)
        wide_counts = _WIDE_COUNT in entry
        run = _read_run(path, entry, size)
        if runs and run.address < runs[-1].end:
            raise invalid(path, f"the entry at {run.address:#x} begins before the end of the one before it")
        if run.offset != REMOTE:
            size += run.length
        runs.append(run)
    pages = directory / f"pages-{name}.img"
    try:
        available = os.stat(pages).st_size if size else 0  # noqa: PTH116 - as os.open above
    except OSError as error:
        raise invalid(pages, f"cannot be read: {error.strerror}") from error
    if available < size:
        raise invalid(pages, f"has {available} bytes; {path.name} needs {size}")
    return _Layer(path, pages, runs, [run.address for run in runs], wide_counts)


def _read_run(path: Path, entry: dict[int, int], offset: int) -> PageRun:
    """Return the run of one entry of a pagemap; `offset`: of its bytes in the file, if they are there."""
    address = entry.get(1)
    count = entry.get(_WIDE_COUNT, entry.get(2))
    if address is None or count is None:
        raise invalid(path, "has an entry without an address or a number of pages")
    # Older images have no flags: they have `in_parent`, or nothing where the pages are present.
    flags = PageFlag(entry[4] & 7 if 4 in entry else 0 if entry.get(3) else 4)
    if entry.get(3):
        flags |= PageFlag.PARENT
    length = count * mmap.PAGESIZE
    _require_pages(path, "the entry", address, length)
    if not flags:
        raise invalid(path, f"the entry at {address:#x} has no flag that says where its pages are")
    return PageRun(address, length, 0, offset if PageFlag.PRESENT in flags else REMOTE, flags)


def _resolve(layers: list[_Layer], runs: Iterable[PageRun], depth: int) -> Iterator[PageRun]:
    """Yield the runs with the file and the offset of their bytes."""
    for run in runs:
        if PageFlag.PARENT not in run.flags:
            yield attrs.evolve(run, file=REMOTE if run.offset == REMOTE else depth)
        else:
            for piece in _resolve(layers, _find_in_parent(layers[depth + 1], run), depth + 1):
                yield attrs.evolve(piece, flags=run.flags)


def _find_in_parent(layer: _Layer, wanted: PageRun) -> Iterator[PageRun]:
    """Yield the parts of a parent's runs that together are a child's run."""
    start = wanted.address
    index = bisect_right(layer.starts, start) - 1
    while start < wanted.end:
        run = layer.runs[index] if 0 <= index < len(layer.runs) else None
        if run is None or not run.address <= start < run.end:
            raise invalid(layer.path, f"has no page at {start:#x}, but a later image says that it has")
        if run.offset == REMOTE and PageFlag.PARENT not in run.flags:
            raise invalid(layer.path, f"has no bytes of the page at {start:#x}, but a later image says that it has")
        end = min(wanted.end, run.end)
        yield run.part(start, end)
        start = end
        index += 1


def _require_mapped(path: Path, runs: tuple[PageRun, ...], mappings: tuple[Range, ...]) -> None:
    """Check that each lazy page lies in a mapping."""
    index = 0
    for run in runs:
        start = run.address
        while run.lazy and start < run.end:
            while index < len(mappings) and mappings[index].end <= start:
                index += 1
            if index == len(mappings) or start < mappings[index].start:
                raise invalid(path, f"has a lazy page at {start:#x}, where the process has no mapping")
            start = min(run.end, mappings[index].end)
