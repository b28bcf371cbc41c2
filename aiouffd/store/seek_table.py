"""The seek table of a file in zstd's seekable format (zstd's contrib/seekable_format, version 0.1.0).

Such a file is frames of zstd, one behind the other, and then a skippable frame with this content, little-endian:

| what | bytes |
| --- | --- |
| for each frame: u32: its length; u32: the length of what it holds; with checksums, u32: the lower half of its XXH64 | 8 or 12 |
| u32: the number of frames | 4 |
| u8: bit 7: there are checksums; bits 2 to 6: zeros | 1 |
| u32: 0x8F92EAB1 | 4 |
"""  # noqa: E501 - a table

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left, bisect_right
from itertools import accumulate, pairwise
from typing import Any, Final

from aiouffd.errors import StoreError
from aiouffd.store.codecs import CODECS, checksum, expand
from aiouffd.store.index import Record

__all__ = ["FOOTER", "LARGEST_FRAME", "SeekTable", "table_length"]

FOOTER: Final = struct.Struct("<IBI")
LARGEST_FRAME: Final = 64 << 20
"""Bytes that a frame may hold: all of it is decompressed for one page."""
_HEAD: Final = struct.Struct("<II")
_SKIPPABLE: Final = 0x184D2A5E
_MAGIC: Final = 0x8F92EAB1
_CHECKSUMS: Final = 0x80
_MOST_FRAMES: Final = 0x8000000
_RESERVED: Final = 0x7C
_PLAIN: Final = (
    "it does not end with the seek table of zstd's seekable format: it is an ordinary .zst file, or it was cut."
    " Decompress it (zstd -d), and write a snapshot of that (aiouffd snapshot create FILE NAME.snap); or write it anew"
    " with a tool that knows the format, such as t2sz or pyzstd.SeekableZstdFile"
)


def table_length(footer: bytes, size: int, name: str) -> int:
    """Return the bytes of the skippable frame at the end of a file.

    Args:
        footer: the last bytes of the file, at least those of `FOOTER` if it has them.
        size: of the file, in bytes.
        name: of the file, for errors.

    Raises:
        StoreError: it has none, or one that is damaged or unknown.
    """
    if len(footer) < FOOTER.size or not footer.endswith(_MAGIC.to_bytes(4, "little")):
        raise StoreError(name, 0, 0, _PLAIN)
    frames: int
    frames, flags, _ = FOOTER.unpack(footer[-FOOTER.size :])
    if flags & _RESERVED:
        raise StoreError(name, 0, 0, f"its seek table has flags {flags:#04x}, which are unknown: use a newer aiouffd")
    if frames > _MOST_FRAMES:
        raise StoreError(name, 0, 0, f"its seek table is damaged: {frames} frames are more than there may be")
    length = _HEAD.size + frames * _entry(flags) + FOOTER.size
    if length > size:
        raise StoreError(name, 0, 0, f"its seek table is damaged: {frames} frames do not fit in {size} bytes")
    return length


class SeekTable:
    """Which frames have which bytes. They are the chunks of the image, of any lengths: see `Index`.

    Args:
        starts: where each frame begins in the image, and where the image ends.
        places: where each frame begins in the file, and where the seek table begins.
        checksums: of what the frames hold; empty if there are none.
    """

    def __init__(self, starts: array[int], places: array[int], checksums: array[int]) -> None:
        self.starts: array[int] = starts
        self.places: array[int] = places
        self.checksums: array[int] = checksums
        self.size: int = starts[-1]
        self.largest: int = max((end - start for start, end in pairwise(starts)), default=0)

    @classmethod
    def decode(cls, data: bytes, size: int, name: str) -> SeekTable:
        """Parse the skippable frame at the end of a file; the arguments are those of `table_length`.

        Raises:
            StoreError: it is damaged.
        """
        frames, flags, _ = FOOTER.unpack(data[-FOOTER.size :])
        if _HEAD.unpack_from(data) != (_SKIPPABLE, len(data) - _HEAD.size):
            raise StoreError(name, 0, 0, f"its seek table is damaged: {frames} frames are not all of its frame")
        words = array("I", data[_HEAD.size : -FOOTER.size])
        step = _entry(flags) // words.itemsize
        lengths, holds = words[::step], words[1::step]
        starts = array("Q", accumulate(holds, initial=0))
        places = array("Q", accumulate(lengths, initial=0))
        if places[-1] != size - len(data):
            reason = f"its frames have {places[-1]} bytes, and {size - len(data)} are before its seek table"
            raise StoreError(name, 0, 0, f"it was cut, or is damaged: {reason}")
        table = cls(starts, places, words[2::step] if step > 2 else array("I"))
        for number, (length, whole) in enumerate(zip(lengths, holds, strict=True)):
            if whole > LARGEST_FRAME:
                reason = f"a frame of {whole} bytes would be decompressed for one page: write it anew with smaller ones"
            elif whole and not 0 < length <= whole + (whole >> 8) + 1024:  # zstd's bound, and its headers
                reason = f"a frame of {length} bytes does not hold {whole}"
            else:
                continue
            raise StoreError(name, starts[number], whole, reason, number)
        return table

    def find(self, chunk: int) -> Record | None:
        """Return where a frame is; None: it holds nothing, as other skippable frames do."""
        if not self.length_of(chunk):
            return None
        place, end = self.places[chunk], self.places[chunk + 1]
        check = self.checksums[chunk].to_bytes(4, "little") if self.checksums else b""
        return Record(chunk, 0, place, end - place, CODECS["zstd"], b"", check)

    def start_of(self, chunk: int) -> int:
        """Return where the bytes of a frame begin in the image."""
        return self.starts[chunk]

    def length_of(self, chunk: int) -> int:
        """Return how many bytes a frame holds."""
        return self.starts[chunk + 1] - self.starts[chunk]

    def within(self, offset: int, length: int) -> range:
        """Return the frames that hold [offset, offset + length)."""
        return range(bisect_right(self.starts, offset) - 1, bisect_left(self.starts, offset + length))

    def path(self, record: Record) -> str:
        """Return nothing: there is one file."""
        return ""

    def expand(self, record: Record, frame: Any) -> Any:
        """Return what a frame holds. Raises ValueError if it is damaged, as far as the file can tell."""
        data = expand(record.codec, frame, self.length_of(record.chunk))
        if record.check and checksum(data) != record.check:
            raise ValueError("its checksum is another than the seek table says")
        return data


def _entry(flags: int) -> int:
    """Return the bytes of a frame in a seek table."""
    return 12 if flags & _CHECKSUMS else 8
