"""Puts the bytes of pages into a complete recording: from recordings that carry them, the others from the source.

They are read again, by a copy of the source that has served: what is in memory may have been written to.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from aiouffd.engine.ahead.pages import PagesWriter, in_order, sorted_together, version_of
from aiouffd.engine.ahead.trace import Trace, begin, part_of
from aiouffd.engine.serve.common import Common
from aiouffd.engine.serve.reads import Reads
from aiouffd.engine.statistics import Counters
from aiouffd.errors import SourceError
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.ranges import batched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiouffd.engine.ahead.pages import RecordedPages, Unit
    from aiouffd.engine.serve.bounds import Limits

__all__ = ["Carried", "keep_pages", "save_with_pages"]

_TOGETHER: Final = 16 << 20  # bytes that are read at once, before they are written
_LARGEST: Final = 2 << 20  # bytes of one read
_UNITS: Final = 16  # that are remembered


class Carried:
    """Pages that recordings of one version of a source carry.

    Args:
        recordings: the recordings.
        version: of the source.
    """

    def __init__(self, recordings: Iterable[Trace], version: bytes) -> None:
        self._places: dict[int, tuple[RecordedPages, int]] = {}
        for trace in recordings:
            if (pages := trace.pages) is not None and pages.version == version:
                self._places.update((at, (pages, place // pages.together)) for place, at in enumerate(pages.offsets))
        load: Callable[[RecordedPages, int], Unit | None] = lambda pages, number: pages.load(number)  # noqa: E731
        self._load = functools.lru_cache(_UNITS)(load)

    def find(self, offset: int, length: int) -> Any:
        """Return the bytes of a page, if they are carried and have their hash; else None. Blocks."""
        pages, number = self._places.get(offset, (None, 0))
        unit = None if pages is None else self._load(pages, number)
        return None if unit is None else unit.at_hand(offset, length)


def save_with_pages(trace: Trace, path: str | os.PathLike[str], recordings: Iterable[Trace], most: int) -> int:
    """Write a recording with the bytes of those of its pages that other recordings carry; return how many. Blocks.

    Of the source, they are of the version that the last one of them has.

    Args:
        trace: the recording.
        path: where to write it.
        recordings: the oldest first.
        most: bytes of pages, at most.

    Raises:
        OSError: it cannot be written; what is there stays.
    """
    recordings = list(recordings)
    versions = [known.pages.version for known in recordings if known.pages is not None]
    carried = Carried(recordings, versions[-1] if versions else bytes(32))
    page, size = trace.page_size, trace.size
    there = [at for at in trace.offsets[: most // page] if carried.find(at, min(page, size - at)) is not None]
    if not there:
        trace.save(path)
        return 0
    _write(trace, Path(path), frozenset(there), versions[-1], carried, _nothing)
    return len(there)


def keep_pages(
    path: str | os.PathLike[str], source: Any, most: int, limits: Limits, recordings: Iterable[Trace] = ()
) -> int:
    """Have the recording at a path carry the bytes of its first pages; return how many. Blocks.

    Args:
        path: of a recording of this source that is complete; it stays as it is if this fails.
        source: a copy of what has served. It is closed.
        most: bytes of pages, at most.
        limits: of the reads.
        recordings: may carry some of the pages already.

    Raises:
        SourceError: they cannot be read.
        TraceError, OSError: the recording cannot be read, or not be written.
    """
    carries: list[int] = []

    def keep() -> None:
        with asyncio.Runner() as runner:
            reads = runner.run(_reads_of(source, attrs.evolve(limits, recent=0)))
            try:
                trace, version = Trace.load(path), version_of(source)
                kept = frozenset(trace.offsets[: most // trace.page_size])
                carried = Carried(recordings, version)
                if kept:
                    _write(trace, Path(path), kept, version, carried, lambda asked: runner.run(_together(reads, asked)))
                carries.append(len(kept))
            finally:
                runner.run(reads.aclose())

    _in_own_thread(keep)
    return carries[0]


async def _reads_of(source: Any, limits: Limits) -> Reads:
    return Reads(Common(source), Counters(), limits)


async def _together(reads: Reads, asked: list[tuple[int, int]]) -> list[Any]:
    return await asyncio.gather(*(reads.fetch(offset, length) for offset, length in asked))


def _nothing(asked: list[tuple[int, int]]) -> list[Any]:
    offset, length = asked[0]
    raise SourceError("a recording", offset, length, "its bytes have changed while they were read")


def _write(
    trace: Trace,
    path: Path,
    kept: frozenset[int],
    version: bytes,
    carried: Carried,
    read: Callable[[list[tuple[int, int]]], list[Any]],
) -> None:
    """Write a recording whose pages are carried by others, or read. Blocks."""
    final = Path(os.path.realpath(path))
    with OwnedDescriptor(begin(final, 0o600)) as file:
        try:
            together = sorted_together(trace.offsets, kept, trace.page_size)
            writer = PagesWriter(file.fileno(), trace.head(kept), version, trace.page_size, together, len(kept))
            for some in batched(in_order(trace.offsets, kept, together), max(_TOGETHER // trace.page_size, 1)):
                for data, length in _bytes_of(some, trace, carried, read):
                    writer.add(data)
                    writer.add(bytes(length - len(data)))  # behind the end of the source
            writer.finish()
            os.fsync(file.fileno())
            part_of(final).rename(final)
        except BaseException:
            part_of(final).unlink(missing_ok=True)
            raise


def _bytes_of(
    offsets: list[int], trace: Trace, carried: Carried, read: Callable[[list[tuple[int, int]]], list[Any]]
) -> list[tuple[memoryview, int]]:
    """Return bytes, and how many there are to be, of pages in this order."""
    page, found = trace.page_size, list[tuple[Any, int]]()
    asked: list[tuple[int, int, int]] = []  # (its place in `found`, offset, length)
    for at in offsets:
        data = carried.find(at, min(page, trace.size - at))
        if data is not None:
            found.append((data, page))
            continue
        place, begin, length = asked[-1] if asked else (-1, -1, 0)
        if place == len(found) - 1 and begin + length == at and length < _LARGEST:
            asked[-1] = place, begin, length + page
            found[-1] = None, length + page
        else:
            asked.append((len(found), at, page))
            found.append((None, page))
    if asked:
        read_of = read([(at, min(length, trace.size - at)) for _, at, length in asked])
        for (place, _, length), data in zip(asked, read_of, strict=True):
            found[place] = data, length
    return [(memoryview(data).cast("B"), length) for data, length in found]


def _in_own_thread(work: Callable[[], None]) -> None:
    """Have a function run to its end where no loop runs, as one may in this thread."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            failed.append(error)

    thread = threading.Thread(target=run, name="aiouffd-recording")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
