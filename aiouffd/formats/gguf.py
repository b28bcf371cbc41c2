"""GGUF: key-value metadata, then tensors, which may be quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aiouffd.formats.arrays import ArrayEntry, ArrayFile
from aiouffd.formats.dtypes import BITS
from aiouffd.formats.header import Cursor
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    from aiouffd.kernel.region import Region

__all__ = ["BLOCKS", "Gguf"]

_MOST: Final = 128 << 20  # bytes of a header: vocabularies take some 10 MiB
_LONGEST_NAME: Final = 65_535
_DEEPEST: Final = 4  # arrays in arrays
_DIMENSIONS: Final = 4
_ALIGNMENT: Final = 32

_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9

_PLAIN: Final = {
    **dict(enumerate((("F32", "float32"), ("F16", "float16")))),
    **dict(enumerate((("I8", "int8"), ("I16", "int16"), ("I32", "int32"), ("I64", "int64"), ("F64", "float64")), 24)),
    30: ("BF16", "bfloat16"),
}
_BLOCKS: Final = (
    "Q4_0 2 32 18,Q4_1 3 32 20,Q5_0 6 32 22,Q5_1 7 32 24,Q8_0 8 32 34,Q8_1 9 32 40,Q2_K 10 256 84"
    ",Q3_K 11 256 110,Q4_K 12 256 144,Q5_K 13 256 176,Q6_K 14 256 210,Q8_K 15 256 292,IQ2_XXS 16 256 66"
    ",IQ2_XS 17 256 74,IQ3_XXS 18 256 98,IQ1_S 19 256 50,IQ4_NL 20 32 18,IQ3_S 21 256 110,IQ2_S 22 256 82"
    ",IQ4_XS 23 256 136,IQ1_M 29 256 56,TQ1_0 34 256 54,TQ2_0 35 256 66,MXFP4 39 32 17,NVFP4 40 64 36"
    ",Q1_0 41 128 18"
)
_QUANTIZED: Final = {
    int(number): (kind, int(elements), int(size))
    for kind, number, elements, size in (said.split() for said in _BLOCKS.split(","))
}

BLOCKS: Final = {kind: (elements, size) for kind, elements, size in _QUANTIZED.values()}
"""How many elements a block of a quantized type has, and how many bytes."""


class Gguf(ArrayFile):
    """The tensors of a `.gguf` file, of version 2 or 3, little-endian.

    A quantized tensor is an array of `uint8`: its blocks as they are, the last axis in bytes. `ArrayEntry.kind` names
    the type, `aiouffd.formats.gguf.BLOCKS` the block. Shapes are in C order, the reverse of what the file has.

    Attributes:
        metadata: what the file says of itself: numbers, texts, and lists of them.
    """

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        self._cursor = Cursor(self._header, 0, _MOST)
        magic, version = self._cursor.take(4, "the magic of GGUF"), self._cursor.number("I", "the version")
        if magic != b"GGUF" or version not in (2, 3):
            raise self._header.wrong(0, f"no GGUF file of version 2 or 3, little-endian: {magic!r}, {version}")
        tensors, pairs = self._cursor.numbers("Q", 2, "the counts")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            at = self._cursor.at
            key = self._cursor.text(_LONGEST_NAME, "a key")
            if key in self.metadata:
                raise self._header.wrong(at, f"the key {key!r:.80} occurs twice")
            self.metadata[key] = self._value(self._cursor.number("I", "a type"), 0)
        said = [self._said() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._header.wrong(0, f"general.alignment is {alignment!r:.40}, no power of two")
        data = align_up(self._cursor.at, alignment)
        for at, name, kind, dims, offset in said:
            if name in self._entries:
                raise self._header.wrong(at, f"the tensor {name!r:.80} occurs twice")
            self._entries[name] = self._entry(at, name, kind, dims, data + offset)
        self._check_overlap()

    def _value(self, kind: int, depth: int) -> Any:
        at = self._cursor.at
        if kind == _TEXT:
            return self._cursor.text(_MOST, "a text")
        if kind == _ARRAY and depth < _DEEPEST:
            kind, count = self._cursor.number("I", "a type"), self._cursor.number("Q", "a count")
            if kind in _NUMBERS:
                return list(self._cursor.numbers(_NUMBERS[kind], count, "an array"))
            return [self._value(kind, depth + 1) for _ in range(count)]
        if kind not in _NUMBERS:
            raise self._header.wrong(at, f"a value of the type {kind} at depth {depth}")
        return self._cursor.number(_NUMBERS[kind], "a value")

    def _said(self) -> tuple[int, str, int, tuple[int, ...], int]:
        """Return (place, name, type, dimensions, offset) of the next tensor."""
        at = self._cursor.at
        name, count = self._cursor.text(_LONGEST_NAME, "a name"), self._cursor.number("I", "a count")
        if count > _DIMENSIONS:
            raise self._header.wrong(at, f"{name!r:.80} has {count} dimensions, and {_DIMENSIONS} are the most")
        dims = self._cursor.numbers("Q", count, "dimensions")
        return at, name, self._cursor.number("I", "a type"), dims, self._cursor.number("Q", "an offset")

    def _entry(self, at: int, name: str, number: int, dims: tuple[int, ...], start: int) -> ArrayEntry:
        shape = list(reversed(dims))
        if number in _PLAIN:
            kind, dtype = _PLAIN[number]
        elif number in _QUANTIZED:
            kind, elements, size = _QUANTIZED[number]
            dtype = "uint8"
            if not shape or shape[-1] % elements:
                raise self._header.wrong(at, f"{name!r:.80} has the shape {shape}, no whole blocks of {elements}")
            shape[-1] = shape[-1] // elements * size
        else:
            raise self._header.wrong(at, f"{name!r:.80} is of the type {number}, which is not known here")
        length = self._header.size_of(at, shape, BITS[dtype], f"{name!r:.80}")
        if start + length > self._header.size:
            raise self._header.wrong(at, f"{name!r:.80} ends at {start + length}, and the file at {self._header.size}")
        return ArrayEntry(name, kind, dtype, tuple(shape), start, length)

    def _check_overlap(self) -> None:
        end = 0
        for entry in sorted(self._entries.values(), key=lambda entry: (entry.start, entry.length)):
            if entry.start < end:
                raise self._header.wrong(entry.start, f"{entry.name!r:.80} begins within another tensor")
            end = entry.start + entry.length
