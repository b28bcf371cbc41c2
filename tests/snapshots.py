"""Images to make snapshots of, and what is read back of them."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from aiouffd.store.index import HEADER, PackName, Record, bitmap, encode_record, head
from aiouffd.store.pack import header_length
from aiouffd.store.snapshot_source import SnapshotSource

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["CHUNK", "HEADER_SIZE", "a_pack", "a_record", "an_image", "damage", "encoded_index", "packs_of", "read_all"]

CHUNK = 64 << 10
HEADER_SIZE = HEADER.size


def an_image(seed: int, chunks: int, tail: int = 0) -> bytes:
    """Return bytes whose chunks are zeros, compressible, or random, and a shorter one behind them."""
    rng = random.Random(seed)
    kinds = (bytes, lambda n: rng.randbytes(n // 4) + bytes(n - n // 4), rng.randbytes)
    return b"".join(rng.choice(kinds)(CHUNK) for _ in range(chunks)) + rng.randbytes(tail)


def encoded_index(size: int, packs: Sequence[PackName], records: Iterable[Record]) -> bytes:
    """Return a whole index."""
    records = sorted(records)
    present = bitmap(size, CHUNK)
    for record in records:
        present[record.chunk >> 3] |= 1 << (record.chunk & 7)
    return head(size, CHUNK, packs, present) + b"".join(encode_record(record, record.pack) for record in records)


def a_pack(number: int, length: int = 10 << 20) -> PackName:
    """Return the name of a pack that nobody has written."""
    return PackName(bytes([number]) * 16, bytes([255 - number]) * 16, length)


def a_record(chunk: int, pack: int = 0, offset: int = header_length(1), length: int = 100, codec: int = 1) -> Record:
    """Return a record of a chunk that nobody has written."""
    return Record(chunk, pack, offset, length, codec, bytes([chunk % 256]) * 20, bytes([chunk % 255]) * 16)


def read_all(place: str | os.PathLike[str], step: int = 1 << 20, **options: Any) -> bytes:
    """Return the image of a snapshot, read piece by piece."""

    async def read() -> bytes:
        source = SnapshotSource(place, **options)
        await source.prepare()
        try:
            pieces = [bytes(await source.read(at, min(step, source.size - at))) for at in range(0, source.size, step)]
        finally:
            await source.aclose()
        return b"".join(pieces)

    return asyncio.run(read())


def packs_of(place: Path) -> list[Path]:
    """Return the packs of a store in a folder."""
    return sorted(path for path in place.glob("packs/*/*") if path.is_file())


def damage(path: Path, at: int, flip: int = 1) -> None:
    """Change a byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ flip]))
