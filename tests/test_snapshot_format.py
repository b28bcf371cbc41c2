"""docs/reference/snapshot-format.md: a reader that was written from that page alone reads what is written."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import blake3
import lz4.block  # type: ignore[import-untyped,unused-ignore]
import pytest
import zstandard
from snapshots import CHUNK, an_image

from aiouffd.store import copy_sync, create_sync, flatten_sync

if TYPE_CHECKING:
    from pathlib import Path


def read(store: Path, name: str) -> bytes:
    """Return the image of a snapshot in a folder."""
    manifest = json.loads((store / name).read_text())
    assert (manifest["format"], manifest["version"]) == ("aiouffd snapshot", 1)
    index = (store / "indexes" / manifest["index"]["hash"]).read_bytes()
    assert blake3.blake3(index).hexdigest() == manifest["index"]["hash"]
    assert len(index) == manifest["index"]["length"]
    magic, version, chunk_size, size, records, packs = struct.unpack_from("<8sIIQQI", index)
    assert (magic, version, chunk_size, size) == (b"aiouffdi", 1, manifest["chunk_size"], manifest["size"])
    chunks = (size + chunk_size - 1) // chunk_size
    groups = (chunks + 511) // 512
    assert len(index) == 64 + 40 * packs + 72 * groups + 48 * records
    return b"".join(chunk(store, index, n, min(chunk_size, size - n * chunk_size)) for n in range(chunks))


def chunk(store: Path, index: bytes, n: int, length: int) -> bytes:
    """Return a chunk, checked."""
    chunk_size, size, _, packs = struct.unpack_from("<IQQI", index, 12)
    before, bitmap = struct.unpack_from("<Q64s", index, 64 + 40 * packs + 72 * (n // 512))
    bit = n % 512
    if not bitmap[bit // 8] >> bit % 8 & 1:
        return bytes(length)
    number = before + sum(bitmap[at // 8] >> at % 8 & 1 for at in range(bit))
    groups = ((size + chunk_size - 1) // chunk_size + 511) // 512
    at = 64 + 40 * packs + 72 * groups + 48 * number
    pack, offset, coded, content, check = struct.unpack_from("<III20s16s", index, at)
    identity, digest, pack_length = struct.unpack_from("<16s16sQ", index, 64 + 40 * pack)
    path = store / "packs" / identity.hex() / digest.hex()
    data = path.read_bytes()
    header = data[: 16 + 40 * struct.unpack_from("<I", data, 12)[0]]
    assert (data[:8], len(data), blake3.blake3(header).digest(16)) == (b"aiouffdp", pack_length, digest)
    frame: bytes
    frame, codec = data[offset : offset + (coded & 0xFFFFFF)], coded >> 24
    assert blake3.blake3(frame).digest(16) == check
    if codec == 1:
        frame = zstandard.ZstdDecompressor().decompress(frame)
    elif codec == 2:
        frame = lz4.block.decompress(frame, uncompressed_size=length)
    assert len(frame) == length
    assert blake3.blake3(frame).digest(20) == content
    return frame


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_another_reader(tmp_path: Path, codec: str) -> None:
    """A first layer, one upon it in which something has changed, that written anew in larger chunks, and copied."""
    data = an_image(71, 20, 99)
    create_sync(data, tmp_path / "a.snap", codec="zstd")
    changed = b"changed" + data[7 : 5 * CHUNK] + bytes(CHUNK) + data[6 * CHUNK :]
    create_sync(changed, tmp_path / "b.snap", base=tmp_path / "a.snap", codec=codec)
    assert read(tmp_path, "a.snap") == data
    assert read(tmp_path, "b.snap") == changed
    flatten_sync(tmp_path / "b.snap", tmp_path / "c.snap", chunk_size=4 * CHUNK)
    copy_sync(tmp_path / "c.snap", tmp_path / "elsewhere" / "d.snap")
    assert read(tmp_path / "elsewhere", "d.snap") == changed


def test_what_a_pack_is_called(tmp_path: Path) -> None:
    """By what is in it, as its header says, and by its header."""
    create_sync(an_image(72, 9), tmp_path / "a.snap", codec="zstd", level=5)
    (path,) = (path for path in tmp_path.glob("packs/*/*") if path.is_file())
    data = path.read_bytes()
    _, version, count = struct.unpack_from("<8sII", data)
    entries = [struct.unpack_from("<I20s16s", data, 16 + 40 * number) for number in range(count)]
    assert version == 1
    assert 16 + 40 * count + sum(coded & 0xFFFFFF for coded, _, _ in entries) == len(data)
    named = b"1 zstd 5\n" + b"".join(content for _, content, _ in entries)
    assert path.parent.name == blake3.blake3(named).hexdigest(16)
    assert path.name == blake3.blake3(data[: 16 + 40 * count]).hexdigest(16)
