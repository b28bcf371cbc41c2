"""A source whose chunks are kept in a `ChunkCache`.

A chunk is fetched as a whole. A fault in it is served from the page cache from then on: by the native part, where the
chunk is mapped (`view`), else by preadv2(2) with RWF_NOWAIT. What has to wait for a disk or a lock is done in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aiouffd.kernel.memory import address_of
from aiouffd.sources import repeated
from aiouffd.sources.daemon_threads import DaemonThreads
from aiouffd.store.chunk_names import ChunkNames
from aiouffd.store.fetches import Fetches
from aiouffd.store.segments import Place
from aiouffd.store.view import View

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiouffd.store.cache import ChunkCache
    from aiouffd.store.segments import Segment

__all__ = ["CachedSource"]

_SCRATCH: Final = 64 << 10  # the most that `page` gives
_THREADS: Final = 8
_WATCH: Final = 1.0  # seconds between two looks whether segments have been evicted
_PEEKED: Final = 2  # chunks that are hashed at once on the loop: 30 us for 64 KiB
_PEEKED_SIZE: Final = 256 << 10  # larger ones are hashed in a thread
_GROUP: Final = 32  # chunks of which the others are checked, too, when one is found


class CachedSource:
    """A source, whose bytes come from a cache where that has them.

    Args:
        source: belongs to this object. See `ChunkNames` for what it must have; what has no names is not kept.
        cache: where chunks are kept.
        is_told: whether it was logged already, where the source has no names.
    """

    plain = True
    """`page` returns None for what `hole` says is zeros."""
    local = False
    """What is not in the cache comes from far."""

    def __init__(self, source: Any, cache: ChunkCache, *, is_told: bool = False) -> None:
        self.source = source
        self.cache = cache
        self._is_told = is_told
        self._named: ChunkNames | None = None
        self._places: dict[int, Place] = {}
        self._held: dict[Segment, list[int]] = {}  # the chunks in each segment
        self._swept: set[int] = set()  # numbers of groups
        self._fetches: Fetches | None = None
        self._pool: DaemonThreads | None = None
        self._view: View | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._scratch_address = address_of(self._scratch)
        self._hole: Callable[[int, int], int] | None = getattr(source, "hole", None)
        self._take_limits()

    def _take_limits(self) -> None:
        for name in ("timeout", "retries"):
            if hasattr(self.source, name):
                setattr(self, name, getattr(self.source, name))

    @property
    def _names(self) -> ChunkNames:
        if self._named is None:
            self._named = ChunkNames(self.source)
            if not (self._named.known or self._is_told) and self._named.size:
                repeated.warn(self.source, "is not cached: its server does not name its version (a strong ETag)")
        return self._named

    @property
    def size(self) -> int:
        """Bytes of the source. The first use may block; raises as that of the source."""
        return self._names.size

    def ask_size(self, meanwhile: Callable[[], None]) -> None:
        """As that of the source, if it has one."""
        self.source.ask_size(meanwhile)

    @property
    def identity(self) -> Any:
        """As that of the source."""
        return getattr(self.source, "identity", None)

    @property
    def cache_identity(self) -> Any:
        """As that of the source."""
        return getattr(self.source, "cache_identity", None)

    @property
    def validator(self) -> Any:
        """As that of the source."""
        return getattr(self.source, "validator", None)

    @property
    def keeps(self) -> bool:
        """Whether chunks are fetched once for all who ask."""
        return self._names.known

    async def prepare(self) -> None:
        """Find the size, in a thread. Canceling is safe. Raises as `size`."""
        await asyncio.to_thread(getattr, self, "size")

    def recording(self) -> bytes | None:
        """As that of the source. Blocks."""
        recording = getattr(self.source, "recording", None)
        return recording() if recording is not None else None

    def begin(self, timeout: float | None, retries: int | None, on_retry: Callable[[], None]) -> None:
        """Tell the source what the Monitor was given."""
        begin = getattr(self.source, "begin", None)
        if begin is not None:
            begin(timeout, retries, on_retry)
            self._take_limits()

    # What is at hand

    def hole(self, offset: int, length: int) -> int:
        """Return how many bytes from `offset` on are known to be zeros, at most `length`."""
        known = 0
        size = self._names.chunk_size
        while known < length:
            number, within = divmod(offset + known, size)
            place = self._places.get(number)
            if place is not None and place.segment is None:
                more = size - within
            else:
                more = 0 if self._hole is None else self._hole(offset + known, length - known)
            if not more:
                break
            known += more
        return min(known, length)

    def page(self, offset: int, length: int) -> int | None:
        """Return the address of the bytes until the next call, if they are resident and of one chunk."""
        number, within = divmod(offset, self._names.chunk_size)
        place = self._places.get(number) or self._peek(number)
        if place is None or place.segment is None or within + length > place.length or length > _SCRATCH:
            return None
        if not place.segment.fill_nowait(place.offset + within, self._scratch[:length]):
            return None
        place.segment.touch()
        return self._scratch_address

    def memory(self) -> tuple[int, int, int, int] | None:
        """Return where chunks are mapped as they come. The descriptor is -2: only what is resident is there."""
        if self._view is None and self._names.known:
            with contextlib.suppress(OSError, ValueError):
                self._view = View(self.size)
        return None if self._view is None else (self._view.address, self.size, -2, self._view.marks)

    def read_nowait(self, offset: int, length: int) -> bytearray | None:
        """Return the bytes, if all are resident."""
        names = self._names
        missing = [number for number in names.range(offset, length) if number not in self._places]
        if len(missing) > _PEEKED or not all(map(self._peek, missing)):
            return None
        data = bytearray(length)
        view = memoryview(data)
        for number, start, stop in names.pieces(offset, length):
            place = self._places[number]
            if place.segment is None:
                continue
            at = number * names.chunk_size + start - offset
            if not place.segment.fill_nowait(place.offset + start, view[at : at + stop - start]):
                return None
            place.segment.touch()
        return data

    def _peek(self, number: int) -> Place | None:
        """Look whether the cache has a chunk at hand."""
        if not self._names.known or self._names.chunk_size > _PEEKED_SIZE or self._is_on_its_way(number):
            return None
        found = self._peek_all([number])
        self._came(found)
        return found[0][1] if found else None

    def _peek_all(self, numbers: Sequence[int]) -> list[tuple[int, Place]]:
        """Return those chunks that the cache has at hand. Does not wait, but hashes them."""
        keys = {number: key for number in numbers if (key := self._names.of(number)) is not None}
        places = zip(keys, self.cache.peek(list(keys.values())), strict=True)
        found = [(n, place) for n, place in places if place is not None and place.length == self._names.length(n)]
        self.cache.count(hits=len(found))
        return found

    def _is_on_its_way(self, number: int) -> bool:
        return self._fetches is not None and number in self._fetches

    def _came(self, found: Sequence[tuple[int, Place]]) -> None:
        """Chunks are in the cache, and are what they should be."""
        for number, place in found:
            self._places[number] = place
            if place.segment is not None:
                self._held.setdefault(place.segment, []).append(number)
        if self._view is not None:
            self._show(self._view, found)
        if self._fetches is not None and found:
            self._look_later()
            groups = {number // _GROUP for number, _ in found} - self._swept
            self._swept |= groups
            for group in groups:
                self._fetches.spawn(self._sweep(group))

    def _show(self, view: View, found: Sequence[tuple[int, Place]]) -> None:
        """Map chunks; those that are adjacent in a segment, too, at once: that takes a third of the time."""
        size = self._names.chunk_size
        found = [(number, place) for number, place in found if not view.has(number * size)]
        at = 0
        while at < len(found):
            number, place = found[at]
            end, stop = at + 1, place.offset + place.length
            while end < len(found) and found[end] == (number + end - at, Place(place.segment, stop, size)):
                end, stop = end + 1, stop + size
            if place.segment is not None:
                length = stop - place.offset & -mmap.PAGESIZE
                view.show(number * size, length, place.segment.fd, place.offset, min(size, length))
            at = end

    async def _sweep(self, group: int) -> None:
        """Check the neighbors of a chunk, so that faults there need not wait for that."""
        numbers = range(group * _GROUP, (group + 1) * _GROUP)
        wanted = [number for number in numbers if self._is_missing(number) and self._names.length(number) > 0]
        found = await self._aside(self._peek_and_show, wanted)
        self._came([(number, place) for number, place in found if self._is_missing(number)])
        for number, place in found:
            if self._places.get(number) != place:  # it has come in another way meanwhile, and may lie elsewhere
                self._hide(number)

    def _peek_and_show(self, numbers: Sequence[int]) -> list[tuple[int, Place]]:
        """As `_peek_all`, and map them: that takes 5 us a chunk, which the loop need not spend. In a thread."""
        found = self._peek_all(numbers)
        if (view := self._view) is not None:
            self._show(view, found)
        return found

    def _is_missing(self, number: int) -> bool:
        return number not in self._places and not self._is_on_its_way(number)

    # What must be waited for

    async def read(self, offset: int, length: int) -> Any:
        """Return the bytes. Canceling is safe: what is on its way comes all the same.

        Raises:
            SourceError: as the source.
        """
        return await self._read(offset, length, urgent=True)

    async def read_ahead(self, offset: int, length: int) -> Any:
        """As `read`, for bytes that no thread waits for."""
        return await self._read(offset, length, urgent=False)

    async def _read(self, offset: int, length: int, *, urgent: bool) -> Any:
        names = self._names
        missing = [number for number in names.range(offset, length) if number not in self._places]
        if not names.known or (missing and not self.cache.usable):
            read = self.source.read if urgent else getattr(self.source, "read_ahead", self.source.read)
            return await read(offset, length)
        if self._fetches is None:
            self._fetches = Fetches(self.source, names, self.cache, self._aside, self._came)
        found = await self._fetches.get(missing, urgent=urgent)
        data = bytearray(length)
        for number, start, stop in names.pieces(offset, length):
            piece = await self._piece(number, start, stop, found.get(number))
            if len(piece) == length:
                return piece
            at = number * names.chunk_size + start - offset
            data[at : at + stop - start] = piece
        return data

    async def _piece(self, number: int, start: int, stop: int, data: Any) -> Any:
        """Return a part of a chunk: of what has just come, of the cache, or, where it fails, of the source."""
        if data is not None:
            return memoryview(data)[start:stop]
        place = self._places.get(number)
        if place is not None and place.segment is None:
            return bytes(stop - start)
        if place is not None and place.segment is not None:
            with contextlib.suppress(OSError):
                data = await self._aside(place.segment.read, place.offset + start, stop - start)
                if len(data) == stop - start:
                    return data
            self._forget([number])
        return await self.source.read(number * self._names.chunk_size + start, stop - start)

    # Segments that go

    def _look_later(self) -> None:
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(_WATCH, self._begin_look)

    def _begin_look(self) -> None:
        if self._fetches is not None:
            self._fetches.spawn(self._look())

    async def _look(self) -> None:
        """Let evicted segments go: as long as one is open or mapped, the disk keeps its room. One look at a time."""
        segments = list(self._held)
        try:
            for segment in await self._aside(lambda: [each for each in segments if each.gone]):
                numbers = self._held.pop(segment)
                self._forget([n for n in numbers if n in self._places and self._places[n].segment is segment])
            await self._aside(self._note_used)
            await self._aside(self.cache.flush)
        finally:
            self._watch = None
        if self._places:
            self._look_later()

    def _note_used(self) -> None:
        """Note which segments the native part has copied from: those that are not used are evicted first."""
        for offset, length in self._view.used() if self._view is not None else ():
            for number in self._names.range(offset, length):
                place = self._places.get(number)
                if place is not None and place.segment is not None:
                    place.segment.touch()

    def _forget(self, numbers: list[int]) -> None:
        for number in numbers:
            self._places.pop(number, None)
            self._swept.discard(number // _GROUP)
            self._hide(number)

    def _hide(self, number: int) -> None:
        if self._view is not None:
            self._view.hide(number * self._names.chunk_size, self._names.length(number) & -mmap.PAGESIZE)

    async def _aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._pool is None:
            self._pool = DaemonThreads(_THREADS, "aiouffd-cache")
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def aclose(self) -> None:
        """End what is under way, and close the source."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._fetches is not None:
            await self._fetches.aclose()
            self._fetches = None
        if self._pool is not None:
            with contextlib.suppress(RuntimeError):
                self._pool.submit(self.cache.flush)
            self._pool.shutdown(wait=False)
            self._pool = None
        self._places.clear()
        self._held.clear()
        if self._view is not None:
            self._view.close()
            self._view = None
        close = getattr(self.source, "aclose", None)
        if close is not None:
            await close()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(CachedSource, is_told=self._named is not None), (self.source, self.cache)

    def __repr__(self) -> str:
        return f"CachedSource({self.source!r}, {self.cache!r})"
