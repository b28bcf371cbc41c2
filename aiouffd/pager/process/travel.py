"""Pickles that take descriptors along.

What the pager runs is pickled by cloudpickle, so that classes and closures of `__main__` travel by value. An object
with a method `travel()` (a source that holds a file or a memfd) is rebuilt from what that returns; descriptors in it
are numbered, and sent beside the pickle.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import cloudpickle

from aiouffd.errors import PagerStartError
from aiouffd.sources.base import Descriptor

__all__ = ["pack", "unpack"]


class _Packer(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.descriptors: list[Descriptor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Descriptor):
            return None
        self.descriptors.append(obj)
        return len(self.descriptors) - 1

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, type) and hasattr(type(obj), "travel"):
            return obj.travel()
        return super().reducer_override(obj)


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, fds: list[int]) -> None:
        super().__init__(file)
        self._fds = fds

    def persistent_load(self, pid: Any) -> Descriptor:
        return Descriptor(self._fds[pid])


def pack(obj: Any) -> tuple[bytes, list[Descriptor]]:
    """Pickle `obj`; return the bytes and the descriptors that must travel beside, which stay their owners'.

    Raises:
        PagerStartError: it cannot travel.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    try:
        packer.dump(obj)
    except Exception as error:
        raise PagerStartError(
            f"{obj!r} cannot travel to the pager process: {error}. Leave out what cannot be pickled (open files,"
            " locks, running loops) and make it in the pager on first use, or run it in this process: engine=InThread()"
            " serves your own threads, engine=InProcess() memory that only others touch"
        ) from error
    return file.getvalue(), packer.descriptors


def unpack(data: bytes, fds: list[int]) -> Any:
    """Rebuild the object; the descriptors belong to it then."""
    return _Unpacker(io.BytesIO(data), fds).load()
