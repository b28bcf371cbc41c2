"""`.npz`: a zip file of `.npy` files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiouffd.formats.npy import npy_entry
from aiouffd.formats.stored_zip import ZippedArrays

if TYPE_CHECKING:
    from aiouffd.formats.arrays import ArrayEntry
    from aiouffd.kernel.region import Region

__all__ = ["Npz"]

_SUFFIX: Final = ".npy"


class Npz(ZippedArrays):
    """The arrays that `numpy.savez` has written. What `numpy.savez_compressed` writes cannot be mapped.

    Names are those of `numpy.load`, without `.npy`. What an array says of itself is read when it is first asked for.
    """

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        self._members = {name.removesuffix(_SUFFIX): name for name in self._infos if name.endswith(_SUFFIX)}
        if self._infos and not self._members:
            raise self._header.wrong(0, f"none of its {len(self._infos)} members is an .npy: no file of numpy.savez")

    def _read(self, name: str, start: int, end: int) -> ArrayEntry:
        return npy_entry(self._header, name, start, end)
