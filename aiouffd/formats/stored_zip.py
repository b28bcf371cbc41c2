"""Arrays in a zip file whose members are stored as they are: where their bytes lie."""

from __future__ import annotations

import io
import struct
import zipfile
from abc import abstractmethod
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Final

from aiouffd.errors import FormatError, UffdError
from aiouffd.formats.arrays import ArrayFile
from aiouffd.formats.header import file_of
from aiouffd.kernel.region_file import RegionFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aiouffd.formats.arrays import ArrayEntry
    from aiouffd.formats.header import Header
    from aiouffd.kernel.region import Region

__all__ = ["ZippedArrays"]

_MOST: Final = 64 << 20  # bytes of the directory: a million members
_LOCAL: Final = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED: Final = 1
_AROUND: Final = 512  # bytes of what stands before a member's: its name, padding, and the header of a .npy


class ZippedArrays(ArrayFile):
    """Arrays that are members of a zip file. What a member says of itself is read when it is first asked for.

    `info`, and what uses it, blocks for that, and raises FormatError for a member that is compressed. Checksums are not
    looked at: that would touch each byte.
    """

    _no_zip: ClassVar[str] = "it is no zip file"

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        self._members: dict[str, str] = {}  # array -> its member
        try:
            with zipfile.ZipFile(_Bounded(self._header)) as archive:
                infos, end = archive.infolist(), archive.start_dir
        except UffdError:
            raise
        except Exception as error:  # zipfile raises many kinds for what is damaged
            raise self._header.wrong(0, f"{self._no_zip}: {type(error).__name__}: {error!s:.200}") from error
        self._infos = {info.filename: info for info in infos}
        if len(self._infos) != len(infos):
            raise self._header.wrong(end, "a name occurs twice in the directory")
        self._next = dict(pairwise(sorted({info.header_offset for info in infos} | {end})))

    def info(self, name: str) -> ArrayEntry:
        """Return where an array is and of what type; the first time, its member's header is read."""
        if name not in self._entries:
            self._entries[name] = self._read(name, *self._find(self._members[name]))
        return self._entries[name]

    @abstractmethod
    def _read(self, name: str, start: int, end: int) -> ArrayEntry:
        """Return what an array is; its member is [start, end)."""

    def _find(self, member: str) -> tuple[int, int]:
        """Return [start, end) of a member's bytes."""
        info = self._infos[member]
        at, size = info.header_offset, info.file_size
        found = _LOCAL.unpack(self._header.take(at, _LOCAL.size, f"the header of {member!r:.80}"))
        magic, _, flags, method = found[:4]
        if magic != b"PK\3\4":
            raise self._header.wrong(at, f"{member!r:.80} does not begin here")
        if method != zipfile.ZIP_STORED or info.compress_type != zipfile.ZIP_STORED:
            way = "only members that are stored can be mapped; what reads files can read `region.as_file()`"
            raise self._header.wrong(at, f"{member!r:.80} is compressed: {way}")
        if (flags | info.flag_bits) & _ENCRYPTED or info.compress_size != size:
            raise self._header.wrong(at, f"{member!r:.80} is encrypted, or its sizes differ")
        start = at + _LOCAL.size + found[9] + found[10]
        if start + size > self._next.get(at, 0):
            raise self._header.wrong(at, f"{member!r:.80} ends at {start + size}, in what comes behind it")
        return start, start + size

    def _look_up(self, names: Iterable[str]) -> None:
        """Bring the headers of many members at once."""
        starts = [self._infos[self._members[name]].header_offset for name in names if name not in self._entries]
        self._bring(self._pages((start, _AROUND) for start in starts))

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


class _Bounded(io.BufferedReader):
    """A region as a file in which a directory that cannot be one is not read."""

    def __init__(self, header: Header) -> None:
        super().__init__(RegionFile(header.region), 4096)
        self._region = header.region

    def read(self, size: int | None = -1, /) -> bytes:
        """As any file, but bounded."""
        if size is not None and size > _MOST:
            raise FormatError(file_of(self._region), self.tell(), f"a directory of {size} bytes; {_MOST} are the most")
        return super().read(size)
