"""What a snapshot is made from: the bytes of an image, and where it has data. All of it blocks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Any, Protocol

from aiouffd.errors import ShortReadError, SourceError, read_failure
from aiouffd.ranges import Range, RangeSet
from aiouffd.sources.file import FileSource
from aiouffd.sources.holes import next_data
from aiouffd.sources.layered import LayeredSource
from aiouffd.sources.rooms import Rooms
from aiouffd.store.resolve import as_source
from aiouffd.store.snapshot_source import SnapshotSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from aiouffd.sources.base import Source

__all__ = ["Changed", "Image", "open_diff", "open_image"]

_STEP = 64 << 20  # bytes for which a source is asked at once where its holes are


class Image(Protocol):
    """Bytes that can be read by several threads."""

    @property
    def size(self) -> int:
        """In bytes."""

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what may not be zeros, in order."""

    def read(self, offset: int, length: int) -> Any:
        """Return a buffer of these bytes. Raises SourceError."""

    def close(self) -> None:
        """Give it up. Raises SourceError if it has changed while it was read."""


def open_image(what: Any, options: Mapping[str, Any] | None = None) -> Image:
    """Return the image that a path, a URL, a buffer or a source names.

    Raises:
        SourceError: there is none.
        TypeError: it is none of these.
    """
    source = as_source(what, options=options)
    return _FileImage(source) if isinstance(source, FileSource) else _SourceImage(source)


def open_diff(
    path: str | os.PathLike[str], base: str | os.PathLike[str], options: Mapping[str, Any] | None
) -> tuple[Image, list[Range]]:
    """Return the image that a sparse file of what has changed makes of a snapshot, and where it may differ from that.

    Raises:
        SourceError: the file cannot be opened, or is smaller than the image of the snapshot.
    """
    with contextlib.closing(open_image(path)) as diff:
        changed = [Range.between(*extent) for extent in diff.extents()]
    return open_image(LayeredSource([SnapshotSource(base, **(options or {})), path])), changed


class _FileImage:
    """A local file. Its holes are not read."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self.size = source.size
        self._fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        self._rooms = Rooms()

    def extents(self) -> Iterator[tuple[int, int]]:
        at = 0
        while at < self.size:
            try:
                start, end = next_data(self._fd, at, self.size)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise SourceError(repr(self._source), at, 0, read_failure(error)) from error
                start, end = at, self.size  # a file system without SEEK_DATA
            if start < end:
                yield start, end
            at = end

    def read(self, offset: int, length: int) -> memoryview:
        data, done = self._rooms.lend(length), 0
        try:
            while done < length and (got := os.preadv(self._fd, [data[done:]], offset + done)):
                done += got
        except OSError as error:
            raise SourceError(repr(self._source), offset, length, read_failure(error)) from error
        if done < length:
            raise ShortReadError(repr(self._source), offset, length, f"the file ended at {offset + done}")
        return data

    def close(self) -> None:
        found = os.fstat(self._fd)
        os.close(self._fd)
        # Without the time of change of its inode, which is another one if the file was replaced, and not written to.
        if (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) != self._source.identity[:4]:
            raise SourceError(repr(self._source), 0, 0, "the file has changed while it was read")


class _SourceImage:
    """Any source, on a loop in a thread of its own."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size = source.size
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="aiouffd-image", daemon=True)
        self._thread.start()

    def extents(self) -> Iterator[tuple[int, int]]:
        hole = getattr(self._source, "hole", None)
        at = 0
        while at < self.size:
            step = min(_STEP, self.size - at)
            zeros = 0 if hole is None else self._call(_answer(hole, at, step))
            if not zeros:
                zeros = min(1 << 20, step)
                yield at, at + zeros
            at += zeros

    def read(self, offset: int, length: int) -> Any:
        data = self._call(self._source.read(offset, length))
        got = memoryview(data).nbytes
        if got != length:
            raise ShortReadError(repr(self._source), offset, length, f"gave {got} bytes of {length}")
        return data

    def _call(self, work: Any) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except (SourceError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise SourceError(repr(self._source), 0, 0, read_failure(error)) from error

    def close(self) -> None:
        close = getattr(self._source, "aclose", None)
        try:
            if close is not None:
                self._call(close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class Changed:
    """An image of which some ranges may differ from its base, and the others are known not to.

    Args:
        image: all of it.
        ranges: what is looked at.
    """

    def __init__(self, image: Image, ranges: Iterable[Range]) -> None:
        self.size: int = image.size
        self.read: Callable[[int, int], Any] = image.read
        self.close: Callable[[], None] = image.close
        ends = ((min(item.start, self.size), min(item.end, self.size)) for item in ranges)
        self._ranges = RangeSet(Range.between(*pair) for pair in ends)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield where it may differ from its base."""
        return ((item.start, item.end) for item in self._ranges)


async def _answer(hole: Any, offset: int, length: int) -> int:
    """Ask a source in its loop."""
    found: int = hole(offset, length)
    return found
