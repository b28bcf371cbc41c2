"""The thread that drops private pages of this process for another one, and how that asks (`dropper.c`), typed."""

from __future__ import annotations

import ctypes
import os
from array import array
from functools import cache
from typing import TYPE_CHECKING

from aiouffd.native import library

if TYPE_CHECKING:
    import mmap

__all__ = ["MOST", "Dropper", "answered", "ask", "take_back"]

MOST = 64
"""Ranges that are asked for at once."""
_RANGES, _RESULTS = 16, 16 + 16 * MOST  # where they begin in the words


@cache
def _library() -> ctypes.CDLL:
    """Return the library, its functions declared."""
    native = library()
    native.aiouffd_dropper.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    native.aiouffd_dropper_end.argtypes = [ctypes.c_void_p]
    native.aiouffd_ask.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    native.aiouffd_ask.restype = None
    native.aiouffd_answered.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    native.aiouffd_take_back.argtypes = [ctypes.c_void_p]
    return native


class Dropper:
    """Drops pages of this process when it is asked, until `close`.

    Args:
        uffd: of the region. It is duplicated.
        words: a memfd of one page of zeros, by which it is asked. It is mapped.
        locked: whether the region is locked in memory (mlockall): nothing is dropped of one that is what this says not.

    Raises:
        OSError: no thread can be started, or no memory be mapped or locked.
    """

    def __init__(self, uffd: int, words: int, *, locked: bool = False) -> None:
        self._made = ctypes.c_void_p()
        if failed := _library().aiouffd_dropper(uffd, words, locked, ctypes.byref(self._made)):
            raise OSError(failed, os.strerror(failed))

    def close(self) -> None:
        """Drop nothing more. What is being dropped is waited for."""
        made, self._made = self._made, ctypes.c_void_p()
        if made.value:
            _library().aiouffd_dropper_end(made)


def ask(words: mmap.mmap, address: int, ranges: list[tuple[int, int]]) -> None:
    """Ask for pages (start, end) to be dropped; nothing else is being asked for. Wakes a thread, and does not wait."""
    for at, (start, end) in enumerate(ranges):
        place = _RANGES + 16 * at
        words[place : place + 16] = start.to_bytes(8, "little") + end.to_bytes(8, "little")
    _library().aiouffd_ask(address, len(ranges))


def answered(words: mmap.mmap, address: int, milliseconds: int, count: int) -> list[int] | None:
    """Wait for the answer, and return for each range 0, or the errno of what was not dropped; None: it has not come."""
    if not _library().aiouffd_answered(address, milliseconds):
        return None
    return [-result for result in array("i", words[_RESULTS : _RESULTS + 4 * count])]


def take_back(address: int) -> bool:
    """Take back what a predecessor may have asked for; False: it is being done."""
    return bool(_library().aiouffd_take_back(address))
