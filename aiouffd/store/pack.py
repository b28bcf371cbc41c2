"""A pack: an object of chunks that were written together.

docs/reference/snapshot-format.md has the table of its bytes: a header, which describes each frame, and the frames. A
reader of a snapshot needs its index only. The header tells a writer that begins again what is in a pack already.

A pack is named by two hashes: its identity, of what is in it, so that a writer that begins again finds it before it has
compressed a byte; and the digest of its header, which has the hashes of all frames, so that two writers with different
compressors never write different bytes under one name.
"""

from __future__ import annotations

import struct
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from aiouffd.errors import StoreError
from aiouffd.store.codecs import CHECK, HASH, codec_name, digest, digest_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["NAME", "Frame", "decode_header", "encode_header", "header_length", "identity", "is_whole", "offsets"]

MAGIC: Final = b"aiouffdp"
VERSION: Final = 1
HEAD: Final = struct.Struct("<8sII")
ENTRY: Final = struct.Struct(f"<I{HASH}s{CHECK}s")
NAME: Final = 16  # bytes of an identity, and of a digest


class Frame(NamedTuple):
    """What a pack's header says of a chunk.

    Attributes:
        length: of its frame.
        codec: the number of its codec.
        hash: of its bytes in the image.
        check: hash of the frame.
    """

    length: int
    codec: int
    hash: bytes
    check: bytes


def header_length(count: int) -> int:
    """Return the bytes of the header of a pack with so many chunks."""
    return HEAD.size + count * ENTRY.size


def identity(hashes: Sequence[bytes], codec: str, level: int) -> bytes:
    """Return the hash of what a pack holds: the hashes of its chunks, and how they were to be compressed."""
    return digest_of([f"{VERSION} {codec} {level}\n".encode(), *hashes], NAME)


def offsets(frames: Sequence[Frame]) -> Iterator[int]:
    """Yield where each frame begins, and where the pack ends."""
    return accumulate((frame.length for frame in frames), initial=header_length(len(frames)))


def encode_header(frames: Sequence[Frame]) -> bytes:
    """Return the header of a pack with these frames."""
    entries = (ENTRY.pack(frame.length | frame.codec << 24, frame.hash, frame.check) for frame in frames)
    return HEAD.pack(MAGIC, VERSION, len(frames)) + b"".join(entries)


def decode_header(data: bytes, name: str) -> list[Frame]:
    """Parse the header of a pack; data: at least all of it; name: of the object, for errors.

    Raises:
        StoreError: it is no pack, or is damaged.
    """
    if len(data) < HEAD.size:
        raise StoreError(name, 0, 0, f"{len(data)} bytes are too few for a pack")
    magic, version, count = HEAD.unpack_from(data)
    if magic != MAGIC:
        raise StoreError(name, 0, 0, "it is no pack of a snapshot")
    if version != VERSION:
        raise StoreError(name, 0, 0, f"its version is {version}; this library reads version {VERSION}")
    if len(data) < header_length(count):
        raise StoreError(name, 0, 0, f"it announces {count} chunks, and ends at {len(data)}")
    coded = ENTRY.iter_unpack(memoryview(data)[HEAD.size : header_length(count)])
    frames = [Frame(word & 0xFFFFFF, word >> 24, hash_, check) for word, hash_, check in coded]
    for frame in frames:
        if not frame.length or codec_name(frame.codec) is None:
            raise StoreError(name, 0, 0, f"its header is damaged: {frame}")
    return frames


def is_whole(data: bytes, name: bytes) -> bool:
    """Tell whether a pack is the one with this digest, and none of its frames is damaged."""
    try:
        frames = decode_header(data, "")
    except StoreError:
        return False
    places = list(offsets(frames))
    view = memoryview(data)
    return (
        digest(view[: places[0]], NAME) == name
        and places[-1] == len(data)
        and all(
            digest(view[start:end], CHECK) == frame.check
            for frame, (start, end) in zip(frames, pairwise(places), strict=True)
        )
    )
