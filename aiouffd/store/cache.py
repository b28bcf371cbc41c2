"""One cache of chunks for all processes of a user on a host.

It is a folder of mode 0700, which one user owns, with these files:

- segments (`segments`): the chunks as a source shows them, decompressed, each at the beginning of a page;
- `index` (`cache_index`): which chunk lies where, and the fingerprint of its bytes;
- `keys` (`key_locks`): a chunk that is fetched is locked there by its fetcher;
- `lock`: whoever adds or removes a segment, or writes to the index, has it locked (flock) for that time.

What makes it safe, in the order in which it happens:

1. A fetcher locks the key, and looks again: another may have brought the chunk meanwhile. The kernel unlocks the keys
   of a process that ends, so the next who waits becomes the fetcher. Who has waited for 20 s fetches without the lock.
2. Room in a segment is taken, then the bytes are written there, then the index names them. A process that is killed in
   between leaves bytes that nobody finds. No byte that the index has ever named is written again.
3. Who finds a chunk in the index reads it and compares its fingerprint, once in each process, before any byte of it is
   shown. So the index, the segments and the disk may be damaged in any way, and after a power failure hold anything: a
   chunk that is not what it should be is fetched again, and forgotten. Nothing is ever synced to the disk.
4. To make room, the segment that has not been used for longest is unlinked, also while it is mapped. Those who map it
   see its bytes until they notice, within a second, and let it go.

All segments together have no more than `max_bytes`, and the index a 500th of that. What fails with the cache (a full
disk, a folder that is gone or read-only, an error of the disk) is logged once, and sources are read as if there were no
cache; after 30 s it is tried again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiouffd.errors import StoreError
from aiouffd.lifetime import close_in_children
from aiouffd.store.cache_files import CacheFiles, open_folder
from aiouffd.store.cache_index import COUNTERS, ZEROS, Entry
from aiouffd.store.codecs import fingerprint
from aiouffd.store.segments import Place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiouffd.store.key_locks import KeyLocks

__all__ = ["SMALLEST", "ChunkCache", "Found"]

log: logging.Logger = logging.getLogger("aiouffd")

SMALLEST: Final = 8 << 20
"""The least that a cache may be limited to."""
_UNIT: Final = 4096  # of places in the index
_TOGETHER: Final = 256 << 10  # bytes that are read at once to look at chunks: they stay in the processor's cache
_rooms = threading.local()
_PAUSE: Final = 30.0  # seconds without the cache after it has failed
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class Found(NamedTuple):
    """A chunk that the cache has.

    Attributes:
        place: where it is.
        data: its bytes, whose fingerprint has been compared; None for zeros.
    """

    place: Place
    data: Any


class ChunkCache:
    """A cache of chunks in a local folder, for all processes of the user who owns it.

    It is made if it is not there. Other users are served by `aiouffd serve`. A file system on a network will not do.

    An object may be used by any number of sources, threads and processes; it holds no more than a path until it is
    used.

    Args:
        path: of the folder.
        max_bytes: limit of the bytes of the chunks, at least 8 MiB. Several processes may name different limits: each
            keeps to its own when it adds to the cache.

    Raises:
        ValueError: `max_bytes` is too small.
        TypeError: it is no whole number.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int) -> None:
        if not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes= takes a whole number of bytes, 50 << 30 for example, not {max_bytes!r:.80}")
        if max_bytes < SMALLEST:
            raise ValueError(f"a cache has at least {SMALLEST} bytes, not {max_bytes}")
        self.path: str = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
        self.max_bytes = max_bytes
        self._lock = threading.Lock()  # of what is open
        self._counting = threading.Lock()
        self._opened: CacheFiles | None = None
        self._locked: dict[bytes, KeyLocks] = {}  # by whom
        self._not_before = 0.0  # when to try again, after it could not be used
        self._full_until = 0.0
        self._said: set[str] = set()
        self._more = dict.fromkeys(COUNTERS, 0)  # counted, and not added to the index yet
        self._pid = os.getpid()
        close_in_children(self)  # a child's duplicates would keep the locks of a parent that is killed

    def check(self) -> None:
        """Make the folder if it is not there, and look whether it can be a cache. Blocks.

        Raises:
            PermissionError: the folder belongs to another user, or others may enter it.
            NotADirectoryError: it is no folder.
        """
        with contextlib.suppress(FileNotFoundError):
            open_folder(self.path).close()

    # What sources ask: all of it blocks, and raises nothing

    @property
    def usable(self) -> bool:
        """Whether chunks may be added now."""
        return time.monotonic() >= max(self._not_before, self._full_until)

    def find(self, key: bytes) -> Found | None:
        """Return the chunk that a key of 20 bytes names, if the cache has it and it is what was added."""
        with self._failures():
            opened = self._open()
            entry = None if opened is None else opened.index.find(key)
            if opened is None or entry is None:
                return None
            if entry.segment == ZEROS:
                return Found(Place(None, 0, entry.length), None)
            segment = opened.segments.find(entry.segment)
            if segment is None:
                return None
            place = Place(segment, entry.page * _UNIT, entry.length)
            data = segment.read(place.offset, entry.length) if place.offset + entry.length <= segment.size else b""
            if fingerprint(data) == entry.fingerprint:
                segment.touch()
                return Found(place, data)
            if not segment.gone:
                self.count(damaged=1)
                self._say("damaged", "the cache %s: chunks of it are damaged, and fetched again", self.path)
                with opened.exclusive():
                    opened.index.remove(entry)
        return None

    def peek(self, keys: Sequence[bytes]) -> list[Place | None]:
        """As `find` of several, but only what is in the page cache, of segments that are open, and without the bytes.

        Does not block.
        """
        places: list[Place | None] = [None] * len(keys)
        opened = self._opened
        if opened is None:
            return places
        for run in _runs([opened.index.find_nowait(key) for key in keys]):
            (number, first), begin = run[0], run[0][1].page * _UNIT
            if first.segment == ZEROS:
                places[number] = Place(None, 0, first.length)
            elif (segment := opened.segments.at_hand(first.segment)) is not None:
                room = _room(_end(run[-1][1]) - begin)
                data = room[: segment.read_nowait(begin, room)]
                for number, entry in run:
                    at = entry.page * _UNIT
                    if fingerprint(data[at - begin : at - begin + entry.length]) == entry.fingerprint:
                        places[number] = Place(segment, at, entry.length)
        return places

    def add(self, chunks: Sequence[tuple[bytes, Any]]) -> list[Place | None]:
        """Keep (key, bytes) of chunks; return where they are now, None where they could not be kept."""
        places: list[Place | None] = [None] * len(chunks)
        with self._failures():
            opened = self._open() if self.usable else None
            if opened is None:
                return places
            stored = []
            for number, (_, data) in enumerate(chunks):
                length = memoryview(data).nbytes
                if not any(memoryview(data).cast("B")[:1]) and _is_zeros(data):
                    places[number] = Place(None, 0, length)
                elif length <= opened.segments.largest:
                    stored.append(number)
            for number, place in zip(stored, opened.segments.append([chunks[n][1] for n in stored]), strict=True):
                places[number] = place
            entries = [
                Entry(
                    key, fingerprint(data), ZEROS if place.segment is None else place.segment.number,
                    place.offset // _UNIT, place.length,
                )
                for (key, data), place in zip(chunks, places, strict=True) if place is not None
            ]  # fmt: skip
            with opened.exclusive():
                opened.index.add(entries)
                self._flush(opened)
                if opened.index.replaced:
                    self._opened = None
            self._said.discard("full")
        return places

    def try_lock(self, key: bytes) -> bool | None:
        """Become the one who fetches a chunk; False: somebody else is; None: there are no locks now."""
        with self._failures():
            opened = self._open()
            if opened is not None:
                locked = opened.keys.try_lock(key)
                if locked:
                    self._locked[key] = opened.keys
                return locked
        return None

    def unlock(self, key: bytes) -> None:
        """The chunk has been fetched, or cannot be had. Does not block."""
        keys = self._locked.pop(key, None)  # the cache may have been opened anew meanwhile
        if keys is not None:
            with contextlib.suppress(OSError):
                keys.unlock(key)

    def count(self, **more: int) -> None:
        """Count what has happened."""
        with self._counting:
            for name, value in more.items():
                self._more[name] += value

    def flush(self) -> None:
        """Add what has been counted to the counters of all processes, and let go what others have evicted."""
        opened = self._opened
        with self._failures():
            if opened is not None:
                opened.segments.let_go()
            if opened is not None and (any(self._more.values()) or opened.segments.evictions):
                with opened.exclusive():
                    self._flush(opened)

    def _flush(self, opened: CacheFiles) -> None:
        with self._counting:
            more, self._more = self._more, dict.fromkeys(COUNTERS, 0)
        more["evictions"] += opened.segments.take_evictions()
        opened.index.count(more)

    # What its owner asks

    def counted(self) -> dict[str, int]:
        """Return what `statistics` does, but for how it is now: that takes longer. Blocks, and raises as it."""
        opened = self._required()
        with opened.exclusive():  # another thread may be adding what it has taken
            self._flush(opened)
            return opened.index.counters()

    def statistics(self) -> dict[str, int]:
        """Return what all processes have counted since the cache was made. Blocks.

        `hits`: chunks that were found; `misses`: that were fetched; `bytes`: that were fetched; `evictions`: segments
        that were removed to make room; `waits`: chunks that another process was fetching; `damaged`: chunks that were
        not what they should be. Besides, as it is now: `segments`, `bytes_held`, `chunks`.

        Raises:
            OSError: the cache cannot be used.
        """
        counted, opened = self.counted(), self._required()
        files = opened.segments.files()
        numbers = {number for number, _ in files} | {ZEROS}
        return {
            **counted,
            "segments": len(files),
            "bytes_held": sum(file.st_blocks * 512 for _, file in files),
            "chunks": sum(entry.segment in numbers for entry in opened.index.entries()),
        }

    def verify(self) -> tuple[int, int]:
        """Compare the fingerprints of all chunks, and forget those that differ. Blocks.

        Returns:
            how many chunks there are, and how many were damaged.

        Raises:
            OSError: the cache cannot be used.
        """
        opened = self._required()
        chunks = damaged = 0
        for entry in opened.index.entries():
            segment = None if entry.segment == ZEROS else opened.segments.find(entry.segment)
            if segment is None:
                continue
            chunks += 1
            try:
                data = segment.read(entry.page * _UNIT, entry.length)
            except OSError:
                data = bytearray()
            if fingerprint(data) != entry.fingerprint and not segment.gone:
                damaged += 1
                with opened.exclusive():
                    opened.index.remove(entry)
        self.count(damaged=damaged)
        self.flush()
        return chunks, damaged

    def trim(self, max_bytes: int) -> int:
        """Remove what has not been used for longest, until no more than `max_bytes` are left. Blocks.

        Returns:
            how many segments were removed.

        Raises:
            OSError: the cache cannot be used.
        """
        opened = self._required()
        with opened.exclusive():
            return opened.segments.evict(max_bytes)

    def close(self) -> None:
        """Let go what it has open, which is closed when nobody uses it. It opens again when it is used."""
        opened, self._opened = self._opened, None
        if self._pid != os.getpid():  # a forked child: threads of the parent may have had the locks
            self._pid, self._lock, self._counting = os.getpid(), threading.Lock(), threading.Lock()
            self._locked = {}
            if opened is not None:
                opened.close()

    def _required(self) -> CacheFiles:
        self._not_before = 0.0
        with self._lock:
            if self._opened is None:
                self._opened = CacheFiles(self.path, self.max_bytes)
            return self._opened

    def _open(self) -> CacheFiles | None:
        """Return the open cache; None: it cannot be used now."""
        with self._lock:
            if self._opened is None and time.monotonic() >= self._not_before:
                self._opened = CacheFiles(self.path, self.max_bytes)
            return self._opened

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Do without the cache for a while, if the block fails."""
        try:
            yield
        except StoreError as error:  # a library is missing
            self._give_up(error.reason)
        except OSError as error:
            if error.errno in _FULL:
                self._full_until = time.monotonic() + _PAUSE
                self._say("full", "the cache %s: nothing can be added to it: %s", self.path, error.strerror)
            else:
                self._give_up(error.strerror or str(error))

    def _give_up(self, reason: str) -> None:
        self._not_before = time.monotonic() + _PAUSE
        self._say(reason, "the cache %s cannot be used: %s; sources are read without it", self.path, reason)
        self.close()

    def _say(self, kind: str, text: str, *values: object) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.warning(text, *values)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChunkCache, (self.path, self.max_bytes)

    def __repr__(self) -> str:
        return f"ChunkCache({self.path!r}, {self.max_bytes})"


def _is_zeros(data: Any) -> bool:
    view = memoryview(data).cast("B")
    return view == bytes(len(view))


def _room(length: int) -> memoryview:
    """Return memory of this thread, on a page: the kernel copies there in less time, and no page of it is new."""
    view: memoryview | None = getattr(_rooms, "view", None)
    if view is None or len(view) < length:
        view = _rooms.view = memoryview(mmap.mmap(-1, max(length, _TOGETHER)))
    return view[:length]


def _end(entry: Entry) -> int:
    """Return where a chunk ends in its segment."""
    return entry.page * _UNIT + entry.length


def _runs(entries: Sequence[Entry | None]) -> list[list[tuple[int, Entry]]]:
    """Return chunks and their numbers in groups that follow each other in a segment, of at most `_TOGETHER` bytes."""
    runs: list[list[tuple[int, Entry]]] = []
    for number, entry in enumerate(entries):
        if entry is None:
            continue
        last = runs[-1][-1][1] if runs else None
        if (
            last is not None
            and entry.segment == last.segment != ZEROS
            and 0 <= entry.page * _UNIT - _end(last) < mmap.PAGESIZE
            and _end(entry) - runs[-1][0][1].page * _UNIT <= _TOGETHER
        ):
            runs[-1].append((number, entry))
        else:
            runs.append([(number, entry)])
    return runs
