"""`store.zstd_seekable`: what a compressed file holds."""

from __future__ import annotations

import asyncio
import pickle
import random
from typing import TYPE_CHECKING, Any

import pytest
import pyzstd
from cached import Far
from seekable import seekable
from snapshots import read_all
from stored import travelled

import aiouffd
from aiouffd.pager.process.serialization import is_pickle, pack
from aiouffd.store import create_sync
from aiouffd.store.resolve import as_source
from examples.page_server import serving

if TYPE_CHECKING:
    from pathlib import Path

RNG = random.Random(8)
PARTS = [RNG.randbytes(RNG.choice([0, 1, 777, 4096, 70_000])) * RNG.choice([1, 3]) for _ in range(60)]
DATA = b"".join(PARTS)
CHUNKS = (len(DATA) + 65535) // 65536  # of a cache


class Compressed(Far):
    """A far source of such a file."""

    def __init__(self, data: bytes = seekable(PARTS)) -> None:
        super().__init__(len(data))
        self.data = data

    def bytes_of(self, offset: int, length: int) -> bytes:
        """Return what must be read."""
        return self.data[offset : offset + length]


async def opened(what: Any, **options: Any) -> aiouffd.ZstdSeekableSource:
    """Return a source that knows its size."""
    source = aiouffd.ZstdSeekableSource(what, **options)
    await source.prepare()
    return source


async def test_any_range(tmp_path: Path) -> None:
    """Of frames of all lengths, with and without checksums and sizes; at hand is what was read before."""
    path = tmp_path / "x.zst"
    for checksums, announced in ((True, True), (False, False)):
        await asyncio.to_thread(path.write_bytes, seekable(PARTS, checksums=checksums, announced=announced))
        source = await opened(path)
        assert source.size == len(DATA)
        for _ in range(60):
            offset = RNG.randrange(len(DATA))
            length = RNG.randrange(1, min(300_000, len(DATA) - offset) + 1)
            expected = DATA[offset : offset + length]
            read = RNG.choice([source.read, source.read_ahead])
            assert bytes(await read(offset, length)) == expected
            at_hand = source.read_nowait(offset, length)
            assert at_hand is None or bytes(at_hand) == expected
        await source.read(5, 1)
        assert bytes(source.read_nowait(5, 1)) == DATA[5:6]
        await source.aclose()


async def test_what_others_write(tmp_path: Path) -> None:
    """Pyzstd's writer; and pyzstd reads what the writer of these tests makes."""

    def write() -> None:
        with pyzstd.SeekableZstdFile(tmp_path / "x.zst", "w", max_frame_content_size=50_000) as file:
            file.write(DATA)
        (tmp_path / "y.zst").write_bytes(seekable(PARTS))
        with pyzstd.SeekableZstdFile(tmp_path / "y.zst") as file:
            file.seek(100_000)
            assert file.read(5000) == DATA[100_000:105_000]

    await asyncio.to_thread(write)
    source = await opened(tmp_path / "x.zst")
    assert source.table.largest == 50_000
    assert bytes(await source.read(0, len(DATA))) == DATA
    await source.aclose()


async def test_neighbors_are_one_request_and_come_once() -> None:
    """Of a far source, whose seek table is one request as well; it is closed with this one."""
    far = Compressed(seekable([RNG.randbytes(1000) for _ in range(300)]))
    source = await opened(far)
    assert len(far.asked) == 1
    await asyncio.gather(source.read(5000, 200_000), source.read(5000, 4096))
    await source.read(100_000, 4096)
    assert len(far.asked) == 2
    await source.aclose()
    large = Compressed(seekable([b"x"] * 9000))
    assert bytes(await (await opened(large)).read(0, 9000)) == b"x" * 9000


async def test_damage(tmp_path: Path) -> None:
    """Of one frame: an error that names it. What has no seek table says what to do; a cut file, too."""
    path = tmp_path / "x.zst"
    parts = [RNG.randbytes(5000) for _ in range(9)]
    whole = seekable(parts)
    at = whole.index(parts[4]) + 2500
    await asyncio.to_thread(path.write_bytes, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    source = await opened(path)
    with pytest.raises(
        aiouffd.StoreError, match=r"ZstdSeekableSource.*chunk 4 \[20000, 25000\): it is damaged: (its checksum|zstd)"
    ):
        await source.read(20_000, 4096)
    assert bytes(await source.read(25_000, 5000)) == parts[5]
    await source.aclose()
    for data, reason in ((whole[:-5000], "it was cut"), (pyzstd.compress(DATA), "zstd -d"), (b"", "zstd -d")):
        await asyncio.to_thread(path.write_bytes, data)
        with pytest.raises(aiouffd.StoreError, match=reason):
            await opened(path)


async def test_what_has_changed_is_an_error(tmp_path: Path) -> None:
    """As of the file alone."""
    path = tmp_path / "x.zst"
    await asyncio.to_thread(path.write_bytes, seekable(PARTS))
    source = await opened(path)
    await asyncio.to_thread(path.write_bytes, seekable(PARTS[:-1]))
    with pytest.raises(aiouffd.StoreError, match="changed"):
        await source.read(0, 4096)
    await source.aclose()


async def test_it_travels_opened(tmp_path: Path) -> None:
    """As plain values: the pager does not read the table again."""
    path = tmp_path / "x.zst"
    await asyncio.to_thread(path.write_bytes, seekable(PARTS))
    source = await opened(path, kept=1 << 20)
    assert not is_pickle(pack(source)[0])
    arrived = await asyncio.to_thread(travelled, source)
    assert arrived._table is not None
    assert arrived._kept == 1 << 20
    assert bytes(await arrived.read(100, 5000)) == DATA[100:5100]
    await arrived.aclose()
    await source.aclose()
    assert (await asyncio.to_thread(pickle.loads, pickle.dumps(source))).size == len(DATA)


async def test_urls_are_cached(tmp_path: Path) -> None:
    """What a URL that ends with `.zst` holds is kept, decompressed; a local file's is not."""
    path = tmp_path / "x.zst"
    await asyncio.to_thread(path.write_bytes, seekable(PARTS))
    cache = aiouffd.ChunkCache(tmp_path / "cache", 8 << 20)
    assert isinstance(as_source(path, cache=cache), aiouffd.ZstdSeekableSource)
    with serving(tmp_path) as url:
        for hits in (0, CHUNKS):
            source: Any = await asyncio.to_thread(as_source, f"{url}/x.zst", cache=cache)
            assert isinstance(source.source, aiouffd.ZstdSeekableSource)
            await source.prepare()
            assert bytes(await source.read(0, len(DATA))) == DATA
            counted: dict[str, int] = {}
            # They are written behind, and one look sees what was counted before it sees which are there.
            while [counted.get(name) for name in ("chunks", "misses", "hits")] != [CHUNKS, CHUNKS, hits]:
                counted = await asyncio.to_thread(cache.statistics)
            await source.aclose()


def test_a_snapshot_of_it(tmp_path: Path) -> None:
    """It is what a snapshot may be made of."""
    (tmp_path / "x.zst").write_bytes(seekable(PARTS))
    create_sync(tmp_path / "x.zst", tmp_path / "s" / "x.snap")
    assert read_all(tmp_path / "s" / "x.snap") == DATA
