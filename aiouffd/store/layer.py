"""The packs and the index of a snapshot that is being written. All of it blocks."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from aiouffd.errors import StoreError
from aiouffd.kernel import files
from aiouffd.store.codecs import CHECK, compressor, digest, digest_of
from aiouffd.store.index import RECORD, PackName, Record, bitmap, encode_record, head
from aiouffd.store.manifest import Link
from aiouffd.store.pack import NAME, Frame, decode_header, encode_header, header_length, identity, offsets
from aiouffd.store.snapshot import index_path, room_for_it

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Executor, Future

    from aiouffd.store.bucket import Bucket
    from aiouffd.store.folder import Folder
    from aiouffd.store.index import Index

__all__ = ["Layer", "in_order"]

PACK_BYTES: Final = 64 << 20  # bytes of the image in a pack, so that its cut does not depend on the compressor
REUSED: Final = 12 * 3600.0  # seconds: a pack that no manifest names is taken if it is younger; see `collect`
_TOGETHER: Final = 16  # chunks that a thread compresses in one go
_UPLOADS: Final = 4  # packs that are being made and written at once, each of them in memory
_COMPRESSED: Final = 2  # of them, those that are not compressed yet, which take more
_PIECE: Final = 1 << 20

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _New(NamedTuple):
    """A chunk that the store may not have.

    Attributes:
        number: of its record.
        chunk: its number in the image.
        hash: of its bytes.
        data: its bytes, until it is in a pack.
    """

    number: int
    chunk: int
    hash: bytes
    data: Any


class _Pack(NamedTuple):
    """A pack that the store has.

    Attributes:
        name: of it.
        frames: in it.
        written: bytes that were written for it.
    """

    name: PackName
    frames: list[Frame]
    written: int


_UNMADE: Final = PackName(b"", b"", 0)


def in_order(
    pool: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """Yield function(item) for each item, in order; at most `ahead` calls are under way."""
    under_way: deque[Future[_Result]] = deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) >= ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


class Layer:
    """Takes the chunks of an image in ascending order, writes those that are new, and then the index of all.

    Args:
        store: where it goes.
        size: bytes of the image.
        chunk_size: bytes of the image in a chunk.
        codec: for new chunks.
        level: of zstd.
        base: the index whose packs have the other chunks; in the same store.
        pool: for compression.
        writing: for packs on their way to the store.
    """

    def __init__(
        self,
        store: Folder | Bucket,
        size: int,
        chunk_size: int,
        codec: str,
        level: int,
        base: Index | None,
        pool: Executor,
        writing: Executor,
    ) -> None:
        self._store = store
        self._size = size
        self._chunk_size = chunk_size
        self._named = codec, level
        self._frame = compressor(codec, level)
        self._base = base
        self._pool = pool
        self._writing = writing
        with room_for_it(store.name("indexes")):
            self._records = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by `close`
        self._unwritten = bytearray()
        self._written_to = 0
        self._present = bitmap(size, chunk_size)
        self._packs: list[PackName] = []  # `_UNMADE` for those that are under way
        self._of_base: dict[int, int] = {}  # number of a pack in the base -> in this index
        self._new: list[_New] = []
        self._bytes = 0
        self._under_way: deque[tuple[int, list[_New], Future[_Pack]]] = deque()
        self._compressing = threading.Semaphore(_COMPRESSED)
        self.records: int = 0
        self.written: int = 0

    def keep(self, record: Record) -> None:
        """Take over a chunk of the base."""
        assert self._base is not None
        pack = self._of_base.get(record.pack)
        if pack is None:
            pack = self._of_base[record.pack] = len(self._packs)
            self._packs.append(self._base.pack(record.pack))
        self._write_record(self._number(record.chunk), encode_record(record, pack))

    def add(self, chunk: int, hash_: bytes, data: Any) -> None:
        """Take a chunk that the base does not have: a buffer of its bytes."""
        self._new.append(_New(self._number(chunk), chunk, hash_, data))
        self._bytes += len(data)
        if self._bytes >= PACK_BYTES:
            self._flush()

    def _number(self, chunk: int) -> int:
        self._present[chunk >> 3] |= 1 << (chunk & 7)
        self.records += 1
        return self.records - 1

    def _write_record(self, number: int, record: bytes) -> None:
        at = number * RECORD.size
        if at != self._written_to + len(self._unwritten) or len(self._unwritten) >= _PIECE:
            self._write_records()
            self._written_to = at
        self._unwritten += record

    def _write_records(self) -> None:
        """Write the records that are in memory; they follow each other."""
        with room_for_it(self._store.name("indexes")):
            files.write_at(self._records.fileno(), self._unwritten, self._written_to)
        self._unwritten.clear()

    def _flush(self) -> None:
        """Have a pack made of the new chunks."""
        new, self._new, self._bytes = self._new, [], 0
        places = [item._replace(data=None) for item in new]
        while len(self._under_way) >= _UPLOADS:
            self._settle()
        self._compressing.acquire()
        self._under_way.append((len(self._packs), places, self._writing.submit(self._make, new)))
        self._packs.append(_UNMADE)

    def _settle(self) -> None:
        """Wait for the oldest pack that is under way, and note where its chunks are."""
        pack, places, made = self._under_way.popleft()
        name, frames, written = made.result()
        self._packs[pack] = name
        self.written += written
        for place, frame, offset in zip(places, frames, offsets(frames), strict=False):  # the last offset is the end
            record = Record(place.chunk, pack, offset, frame.length, frame.codec, place.hash, frame.check)
            self._write_record(place.number, encode_record(record, pack))

    def _found(self, named: bytes, new: list[_New]) -> tuple[PackName, list[Frame]] | None:
        """Return a pack of these chunks that a writer has left, which was killed, or is at work."""
        for entry in self._store.list(f"packs/{named.hex()}"):
            name = entry.path.rpartition("/")[2]
            header = header_length(len(new))
            if len(name) != 2 * NAME or time.time() - entry.modified > REUSED or entry.size < header:
                continue
            data = self._store.read(entry.path, 0, header)
            if digest(data, NAME).hex() != name:
                continue
            frames = decode_header(data, entry.path)
            whole = [frame.hash for frame in frames] == [item.hash for item in new]
            if whole and list(offsets(frames))[-1] == entry.size:
                return PackName(named, bytes.fromhex(name), entry.size), frames
        return None

    def _make(self, new: list[_New]) -> _Pack:
        """Make a pack of some chunks, unless the store has one of them already. In a thread that waits."""
        named = identity([item.hash for item in new], *self._named)
        try:
            found = self._found(named, new)
            if found is not None:
                return _Pack(*found, 0)
            groups = (new[at : at + _TOGETHER] for at in range(0, len(new), _TOGETHER))  # no name keeps one
            made = list(chain.from_iterable(self._pool.map(self._compress, groups)))
        finally:
            new.clear()
            self._compressing.release()
        frames = [frame for frame, _ in made]
        header = encode_header(frames)
        name = PackName(named, digest(header, NAME), list(offsets(frames))[-1])
        self._store.put(name.path, [header, *(data for _, data in made)])
        return _Pack(name, frames, name.length)

    def _compress(self, group: list[_New]) -> list[tuple[Frame, Any]]:
        made = []
        for item in group:
            codec, data = self._frame(item.data)
            made.append((Frame(len(data), codec, item.hash, digest(data, CHECK)), data))
        return made

    def finish(self) -> Link:
        """Write what is left, and then the index.

        Raises:
            StoreError: it cannot be written, or a pack that it names has been removed meanwhile.
        """
        if self._new:
            self._flush()
        while self._under_way:
            self._settle()
        self._write_records()
        for pack, size in zip(
            self._packs, self._writing.map(self._store.size, [pack.path for pack in self._packs]), strict=True
        ):
            if size != pack.length:
                raise StoreError(self._store.name(pack.path), 0, 0, "it has gone while a layer was written upon it")
        first = head(self._size, self._chunk_size, self._packs, self._present)
        link = Link(digest_of(chain([first], self._read_records()), 32).hex(), len(first) + self.records * RECORD.size)
        self._store.put(index_path(link), chain([first], self._read_records()))
        return link

    def _read_records(self) -> Iterator[bytes]:
        for at in range(0, self.records * RECORD.size, _PIECE):
            yield os.pread(self._records.fileno(), _PIECE, at)

    def close(self) -> None:
        """Wait for packs on their way, and give up what was kept of the index."""
        for _, _, made in self._under_way:
            made.cancel()
        self._records.close()

    def __enter__(self) -> Layer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
