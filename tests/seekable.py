"""Writes files in zstd's seekable format, from its specification."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import xxhash
import zstandard

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAGIC", "SKIPPED", "seek_table", "seekable"]

MAGIC = 0x8F92EAB1
SKIPPED = struct.pack("<II", 0x184D2A50, 5) + b"aside"
"""A skippable frame, which holds nothing."""


def seek_table(entries: Sequence[tuple[int, ...]], flags: int = 0x80, magic: int = MAGIC) -> bytes:
    """Return a skippable frame with these entries: (compressed size, size[, checksum])."""
    packed = b"".join(struct.pack(f"<{len(entry)}I", *entry) for entry in entries)
    content = packed + struct.pack("<IBI", len(entries), flags, magic)
    return struct.pack("<II", 0x184D2A5E, len(content)) + content


def seekable(parts: Sequence[bytes], *, checksums: bool = True, announced: bool = True) -> bytes:
    """Return a file with a frame for each part; an empty part is a skippable frame.

    Args:
        parts: what the frames hold.
        checksums: whether the table has them.
        announced: whether frames tell their size, as zstd's own writer of this format does not.
    """
    context = zstandard.ZstdCompressor(level=1, write_content_size=announced)
    frames = [context.compress(part) if part else SKIPPED for part in parts]
    entries: list[tuple[int, ...]] = [(len(frame), len(part)) for frame, part in zip(frames, parts, strict=True)]
    if checksums:
        entries = [
            (*entry, xxhash.xxh64_intdigest(part) & 0xFFFFFFFF) for entry, part in zip(entries, parts, strict=True)
        ]
    return b"".join(frames) + seek_table(entries, 0x80 if checksums else 0)
