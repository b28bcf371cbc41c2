"""The index of a snapshot: where each chunk of its image is.

docs/reference/snapshot-format.md has the table of its bytes: a header, the packs, the groups of 512 chunks (the records
before it, and a bit for each chunk: 0, it is zeros), and the records, of fixed width, in the order of their chunks.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiouffd.errors import StoreError, read_failure
from aiouffd.ranges import batched
from aiouffd.store.codecs import CHECK, HASH, codec_name, digest, expand
from aiouffd.store.manifest import checked_chunk_size
from aiouffd.store.pack import header_length

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["RECORD", "Index", "PackName", "Record", "bitmap", "encode_record", "head"]

MAGIC: Final = b"aiouffdi"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQQI28s")
PACK: Final = struct.Struct("<16s16sQ")
GROUP: Final = struct.Struct("<Q64s")
RECORD: Final = struct.Struct(f"<III{HASH}s{CHECK}s")
CHUNKS: Final = 512  # in a group
LARGEST_PACK: Final = (1 << 32) - 1


class PackName(NamedTuple):
    """Names a pack: what is in it, and its very bytes.

    Attributes:
        identity: see `pack.identity`.
        digest: the hash of its header, which has the hashes of all frames.
        length: its bytes.
    """

    identity: bytes
    digest: bytes
    length: int

    @property
    def path(self) -> str:
        """Where it is in the store."""
        return f"packs/{self.identity.hex()}/{self.digest.hex()}"


class Record(NamedTuple):
    """Where a chunk is.

    Attributes:
        chunk: its number.
        pack: the number of its pack in this index.
        offset: of its frame in the pack.
        length: of its frame.
        codec: the number of its codec.
        hash: of its bytes in the image.
        check: hash of its frame.
    """

    chunk: int
    pack: int
    offset: int
    length: int
    codec: int
    hash: bytes
    check: bytes


class Index:
    """An index, whose records are read when they are asked for. The rest is in memory: 3 MiB for a TiB of image.

    Args:
        data: the whole index, which stays as it is: bytes, or what has a length and gives bytes for slices.
        name: of the object, for errors.

    Attributes:
        size: bytes of the image.
        chunk_size: bytes of the image in a chunk.
        chunks: how many the image has.
        records: how many have a record.
        packs: how many packs it names.

    Raises:
        StoreError: it is no index, or is damaged.
    """

    def __init__(self, data: Any, name: str) -> None:
        self._data = data
        self.name = name
        if len(data) < HEADER.size:
            raise self._damaged(f"{len(data)} bytes are too few for an index")
        magic, version, chunk_size, size, records, packs, rest = HEADER.unpack(data[: HEADER.size])
        self.size: int = size
        self.records: int = records
        self.packs: int = packs
        if magic != MAGIC:
            raise self._damaged("it is no index of a snapshot")
        if version != VERSION:
            raise self._damaged(f"its version is {version}; this library reads version {VERSION}")
        try:
            self.chunk_size: int = checked_chunk_size(chunk_size)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        self.chunks: int = -(-self.size // self.chunk_size)
        groups = -(-self.chunks // CHUNKS)
        self._groups = HEADER.size + self.packs * PACK.size
        self._records = self._groups + groups * GROUP.size
        expected = self._records + self.records * RECORD.size
        if len(data) != expected or any(rest) or not self.size:
            raise self._damaged(f"its header asks for {expected} bytes, and it has {len(data)}")
        self._head = bytes(data[: self._records])
        self._check_groups()

    def _check_groups(self) -> None:
        before = 0
        last = self.chunks % CHUNKS or CHUNKS
        for first, bitmap in GROUP.iter_unpack(memoryview(self._head)[self._groups :]):
            if first != before:
                raise self._damaged(f"a group begins at record {first}, and not at {before}")
            bits = int.from_bytes(bitmap, "little")
            before += bits.bit_count()
        if before != self.records or (self.chunks and bits >> last):
            raise self._damaged(f"its groups have {before} chunks, and its header {self.records}")

    def _damaged(self, reason: str, chunk: int | None = None) -> StoreError:
        place = (0, 0) if chunk is None else (chunk * self.chunk_size, self.length_of(chunk))
        return StoreError(self.name, *place, reason, chunk)

    def start_of(self, chunk: int) -> int:
        """Return where a chunk begins in the image."""
        return chunk * self.chunk_size

    def length_of(self, chunk: int) -> int:
        """Return the bytes of the image in a chunk: the last one may be shorter."""
        return min(self.chunk_size, self.size - chunk * self.chunk_size)

    def within(self, offset: int, length: int) -> range:
        """Return the chunks that have bytes of [offset, offset + length)."""
        return range(offset // self.chunk_size, -(-(offset + length) // self.chunk_size))

    def path(self, record: Record) -> str:
        """Return where the pack of a chunk is in the store."""
        return self.pack(record.pack).path

    def expand(self, record: Record, frame: Any) -> Any:
        """Return the bytes of a chunk. Raises ValueError if its frame is damaged."""
        if digest(frame, CHECK) != record.check:
            raise ValueError("its hash is another than the index says")
        return expand(record.codec, frame, self.length_of(record.chunk))

    def pack(self, number: int) -> PackName:
        """Return the name of a pack."""
        return PackName(*PACK.unpack_from(self._head, HEADER.size + number * PACK.size))

    def _group(self, chunk: int) -> tuple[int, int]:
        """Return (records before the chunk's group, bits of its chunks)."""
        first, bitmap = GROUP.unpack_from(self._head, self._groups + chunk // CHUNKS * GROUP.size)
        return first, int.from_bytes(bitmap, "little")

    def find(self, chunk: int) -> Record | None:
        """Return where a chunk is; None: it is zeros.

        Raises:
            StoreError: its record is damaged, or cannot be read.
        """
        place = chunk % CHUNKS
        first, bits = self._group(chunk)
        if not bits >> place & 1:
            return None
        (record,) = self._records_of([chunk], first + _set_below(bits, place))
        return record

    def find_all(self, low: int = 0, high: int | None = None) -> Iterator[Record]:
        """Yield where the chunks in [low, high) are that are not zeros, in order. Raises as `find`."""
        first, bits = self._group(low) if low < self.chunks else (0, 0)
        number = first + _set_below(bits, low % CHUNKS)
        present = self.present(low, self.chunks if high is None else high)
        for chunks in batched(present, CHUNKS):
            yield from self._records_of(chunks, number)
            number += len(chunks)

    def _records_of(self, chunks: list[int], number: int) -> Iterator[Record]:
        """Yield the records of chunks, which follow each other from `number` on."""
        at, stop = (self._records + n * RECORD.size for n in (number, number + len(chunks)))
        try:
            data = self._data[at:stop]
        except OSError as error:
            raise self._damaged(read_failure(error), chunks[0]) from error
        if len(data) < stop - at:
            raise self._damaged("it was cut after it was opened", chunks[0])
        for chunk, fields in zip(chunks, RECORD.iter_unpack(data), strict=True):
            yield self._checked(chunk, *fields)

    def _checked(self, chunk: int, pack: int, offset: int, coded: int, hash_: bytes, check: bytes) -> Record:
        length, codec = coded & 0xFFFFFF, coded >> 24
        if pack >= self.packs:
            raise self._damaged(f"its pack {pack} is none of {self.packs}", chunk)
        end = self.pack(pack).length
        if codec_name(codec) is None:
            raise self._damaged(f"its codec {codec} is unknown", chunk)
        whole = self.length_of(chunk)
        if not 0 < length <= whole or (codec == 0 and length != whole):
            raise self._damaged(f"its frame of {length} bytes cannot hold {whole}", chunk)
        if offset < header_length(1) or offset + length > end or end > LARGEST_PACK:
            raise self._damaged(f"its frame [{offset}, {offset + length}) is not in its pack of {end} bytes", chunk)
        return Record(chunk, pack, offset, length, codec, hash_, check)

    def present(self, low: int, high: int) -> Iterator[int]:
        """Yield the numbers of the chunks in [low, high) that are not zeros."""
        while low < high:
            end = min(low - low % CHUNKS + CHUNKS, high)
            bits = self._group(low)[1] >> low % CHUNKS & ((1 << end - low) - 1)
            while bits:
                last = bits & -bits
                yield low + last.bit_length() - 1
                bits ^= last
            low = end

    def absent(self, low: int, high: int) -> int:
        """Return how many chunks from `low` on are zeros, looking no further than `high`."""
        at = low
        while at < high:
            bits = self._group(at)[1] >> at % CHUNKS
            if bits:
                return min(at + (bits & -bits).bit_length() - 1, high) - low
            at += CHUNKS - at % CHUNKS
        return max(high - low, 0)


def _set_below(bits: int, place: int) -> int:
    """Return how many of the lowest bits are set."""
    return (bits & ((1 << place) - 1)).bit_count()


def encode_record(record: Record, pack: int) -> bytes:
    """Return the 48 bytes of a record, in an index where its pack has another number."""
    return RECORD.pack(pack, record.offset, record.length | record.codec << 24, record.hash, record.check)


def head(size: int, chunk_size: int, packs: Iterable[PackName], present: bytes | bytearray) -> bytes:
    """Return an index as far as its records, which follow in the order of the chunks.

    Args:
        size: bytes of the image.
        chunk_size: bytes of the image in a chunk.
        packs: in the order of their numbers.
        present: which chunks have a record: see `bitmap`.
    """
    named = b"".join(PACK.pack(*pack) for pack in packs)
    groups = []
    before = 0
    for at in range(0, len(present), CHUNKS // 8):
        bits = bytes(present[at : at + CHUNKS // 8])
        groups.append(GROUP.pack(before, bits))
        before += int.from_bytes(bits, "little").bit_count()
    header = HEADER.pack(MAGIC, VERSION, chunk_size, size, before, len(named) // PACK.size, bytes(28))
    return header + named + b"".join(groups)


def bitmap(size: int, chunk_size: int) -> bytearray:
    """Return the bits of the chunks of an image, none of them set: that of chunk n is n % 8 of byte n // 8."""
    return bytearray(-(-size // chunk_size // CHUNKS) * CHUNKS // 8)
