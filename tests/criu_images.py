"""Writes CRIU's images, as much of them as is read here."""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

PAGE = mmap.PAGESIZE
COMMON, PAGEMAP, MM = 0x54564319, 0x56084025, 0x57492820
PARENT, LAZY, PRESENT = 1, 2, 4


def varint(value: int) -> bytes:
    """Return a number in the encoding of protocol buffers."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def message(fields: Iterable[tuple[int, int | bytes]]) -> bytes:
    """Return a message of numbers and of bytes."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        else:
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


def image(magic: int, messages: Iterable[bytes]) -> bytes:
    """Return an image: two magics, and each message behind its length."""
    return struct.pack("<II", COMMON, magic) + b"".join(struct.pack("<I", len(item)) + item for item in messages)


def pagemap(pages_id: int, entries: Iterable[Mapping[int, int]]) -> bytes:
    """Return a pagemap; an entry is its fields by number."""
    return image(PAGEMAP, [message([(1, pages_id)]), *(message(entry.items()) for entry in entries)])


def mm(bounds: Iterable[tuple[int, int]]) -> bytes:
    """Return the image of mappings, with a field before them and one behind."""
    mappings = [message([(1, start), (2, end), (5, 3), (8, 1)]) for start, end in bounds]
    return image(MM, [message([(1, 0x400000), *((14, item) for item in mappings), (15, 1)])])


def write(
    directory: Path,
    pid: int,
    entries: Iterable[Mapping[int, int]],
    bounds: Iterable[tuple[int, int]],
    pages: bytes | int,
    pages_id: int = 1,
) -> None:
    """Write the three images of a process; `pages`: the bytes, or how many."""
    directory.mkdir(exist_ok=True)
    (directory / f"pagemap-{pid}.img").write_bytes(pagemap(pages_id, entries))
    (directory / f"mm-{pid}.img").write_bytes(mm(bounds))
    with (directory / f"pages-{pages_id}.img").open("wb") as file:
        if isinstance(pages, int):
            file.truncate(pages)
        else:
            file.write(pages)
