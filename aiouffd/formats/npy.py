"""`.npy`: one array of numpy."""

from __future__ import annotations

import ast
import struct
from typing import TYPE_CHECKING, Any, Final

from aiouffd.formats.arrays import ArrayEntry, ArrayFile

if TYPE_CHECKING:
    from aiouffd.formats.header import Header
    from aiouffd.kernel.region import Region

__all__ = ["Npy", "npy_entry"]

_MAGIC: Final = b"\x93NUMPY"
_MOST: Final = 10_000  # bytes of a header, as numpy's own limit


class Npy(ArrayFile):
    """The array that `numpy.save` has written, as `.array`. As a mapping it has one name, `array`."""

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        self._entries["array"] = npy_entry(self._header, "array", 0, len(region))

    @property
    def array(self) -> Any:
        """The array, on the region."""
        return self["array"]


def npy_entry(header: Header, name: str, start: int, end: int) -> ArrayEntry:
    """Return what stands in [start, end) as a `.npy` file.

    Raises:
        FormatError: it is none, or its elements are Python objects.
    """
    magic = header.take(start, 8, "the magic of .npy")
    version = magic[6]
    if magic[:6] != _MAGIC or version not in (1, 2, 3):
        raise header.wrong(start, f"{name!r:.80} is no .npy file of version 1, 2 or 3: {magic!r}")
    form = "<H" if version == 1 else "<I"
    size = struct.calcsize(form)
    (length,) = struct.unpack(form, header.take(start + 8, size, "the length of the header"))
    if length > _MOST:
        raise header.wrong(start + 8, f"a header of {length} bytes; {_MOST} are the most")
    at = start + 8 + size
    text = header.take(at, length, "the header").decode("utf-8" if version == 3 else "latin-1", errors="replace")
    dtype, shape, is_fortran = _understood(header, at, text)
    begin = at + length
    size = header.size_of(at, shape, dtype.itemsize * 8, f"{name!r:.80}")
    if begin + size > end:
        raise header.wrong(at, f"{name!r:.80} has {size} bytes, and only {end - begin} are there")
    strides = None
    if is_fortran and size:
        steps = [1]
        for number in shape[:-1]:
            steps.append(steps[-1] * number)
        strides = tuple(steps[: len(shape)])
    return ArrayEntry(name, dtype.str, dtype, shape, begin, size, strides)


def _understood(header: Header, at: int, text: str) -> tuple[Any, tuple[int, ...], bool]:
    """Return type, shape and whether the order is Fortran's."""
    from numpy.lib.format import descr_to_dtype  # noqa: PLC0415 - an extra

    try:
        found = ast.literal_eval(text)
        dtype, shape, is_fortran = descr_to_dtype(found["descr"]), found["shape"], found["fortran_order"]
    except Exception as error:
        raise header.wrong(at, f"the header is not understood: {type(error).__name__}: {error!s:.200}") from error
    if not dtype.itemsize:
        raise header.wrong(at, f"its elements have no bytes: {dtype.str}")
    if dtype.hasobject:
        raise header.wrong(at, "its elements are Python objects, which are no memory to map: numpy.load(allow_pickle)")
    if type(shape) is not tuple or type(is_fortran) is not bool:
        raise header.wrong(at, f"its shape is {shape!r:.80}, in Fortran's order {is_fortran!r:.80}")
    return dtype, shape, is_fortran
