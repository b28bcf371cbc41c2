"""Safetensors: a JSON header, then the tensors."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, Final

from aiouffd.formats.arrays import ArrayEntry, ArrayFile
from aiouffd.formats.dtypes import BITS

if TYPE_CHECKING:
    from aiouffd.kernel.region import Region

__all__ = ["Safetensors"]

_MOST: Final = 100_000_000  # bytes of a header, as the limit of the package safetensors
_TYPES: Final = (
    "BOOL=bool I8=int8 I16=int16 I32=int32 I64=int64 U8=uint8 U16=uint16 U32=uint32 U64=uint64"
    " F16=float16 BF16=bfloat16 F32=float32 F64=float64 C64=complex64 F8_E4M3=float8_e4m3fn F8_E5M2=float8_e5m2"
    " F8_E8M0=float8_e8m0fnu F8_E4M3FNUZ=float8_e4m3fnuz F8_E5M2FNUZ=float8_e5m2fnuz"
)
_KINDS: Final = dict(pair.split("=") for pair in _TYPES.split())


class Safetensors(ArrayFile):
    """The tensors of a `.safetensors` file.

    Attributes:
        metadata: texts that the file has about itself (`__metadata__`).
    """

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        (length,) = struct.unpack("<Q", self._header.take(0, 8, "the length of the header"))
        if length > _MOST:
            raise self._header.wrong(0, f"no safetensors file: a header of {length} bytes; {_MOST} are the most")
        described = self._parsed(self._header.take(8, length, "the header"))
        self.metadata: dict[str, str] = described.pop("__metadata__", {})
        if not isinstance(self.metadata, dict):
            raise self._header.wrong(8, f"__metadata__ is no object: {self.metadata!r:.80}")
        found = [self._entry(name, said, 8 + length) for name, said in described.items()]
        self._check_order(found, 8 + length)
        self._entries = {entry.name: entry for entry in found}

    def _parsed(self, text: bytes) -> dict[str, Any]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) != len(pairs):
                raise ValueError("a name occurs twice")
            return found

        try:
            described = json.loads(text.decode(), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise self._header.wrong(8, f"the header is no JSON: {error!s:.200}") from error
        if not isinstance(described, dict):
            raise self._header.wrong(8, f"the header is no object: {described!r:.80}")
        return described

    def _entry(self, name: str, said: Any, data: int) -> ArrayEntry:
        """Return what the header says of one tensor."""
        try:
            kind, shape, (start, end) = said["dtype"], said["shape"], said["data_offsets"]
        except (TypeError, ValueError, KeyError) as error:
            raise self._header.wrong(8, f"{name!r:.80} has no dtype, shape and data_offsets: {said!r:.80}") from error
        dtype = _KINDS.get(kind) if isinstance(kind, str) else None
        if dtype is None:
            raise self._header.wrong(8, f"{name!r:.80} is of the type {kind!r:.40}, which is not known here")
        if type(shape) is not list or type(start) is not int or type(end) is not int or not 0 <= start <= end:
            raise self._header.wrong(
                8, f"{name!r:.80} has the shape {shape!r:.80} and lies in {start!r:.40}-{end!r:.40}"
            )
        size = self._header.size_of(8, shape, BITS[dtype], f"{name!r:.80}")
        if size != end - start:
            raise self._header.wrong(8, f"{name!r:.80} takes {size} bytes, and has {end - start}")
        return ArrayEntry(name, kind, dtype, tuple(shape), data + start, size)

    def _check_order(self, found: list[ArrayEntry], data: int) -> None:
        """Let the tensors be all that there is behind the header, as the format demands: no gaps, nothing twice."""
        at = data
        for entry in sorted(found, key=lambda entry: (entry.start, entry.length)):
            if entry.start != at:
                raise self._header.wrong(
                    entry.start, f"{entry.name!r:.80} begins here, and what is before it ends at {at}"
                )
            at += entry.length
        if at != self._header.size:
            raise self._header.wrong(at, f"the tensors end here, and the file ends at {self._header.size}")
