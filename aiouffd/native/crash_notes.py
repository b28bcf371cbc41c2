"""Sentences about ranges of addresses, typed (`crash_notes.c`): said when a thread gets a fatal signal there."""

from __future__ import annotations

import ctypes
import enum
import os
from functools import cache

from aiouffd.lifetime import until_exit
from aiouffd.native import library, reason

__all__ = ["Note", "When"]

_LONGEST = 590  # bytes


class When(enum.IntEnum):
    """What happens to a thread that touches the range."""

    LEFT = 0  # SIGBUS, since a Monitor has left it
    ABSENT = 1  # SIGSEGV in a forked child, which does not have it


@cache
def _library() -> ctypes.CDLL:
    """Return the library, its functions declared."""
    notes = library()
    number, address = ctypes.c_int, ctypes.c_uint64
    notes.aiouffd_note.argtypes = [address, address]
    notes.aiouffd_note_set.argtypes = [number, number, ctypes.c_char_p]
    notes.aiouffd_note_move.argtypes = [number, address, address]
    notes.aiouffd_note_drop.argtypes = [number]
    return notes


class Note:
    """What is said about a range, until `close`. Nothing is, without the native part, or with more than 512 notes.

    Args:
        start: an address.
        length: in bytes.
    """

    def __init__(self, start: int, length: int) -> None:
        self._pid = os.getpid()
        self._number = -1 if reason() else int(_library().aiouffd_note(start, start + length))

    def say(self, when: When, sentence: str) -> None:
        """Have `sentence` said about a touch. It follows the thread, the address and the offset."""
        if self._number >= 0:
            _library().aiouffd_note_set(self._number, when, sentence.encode(errors="replace")[:_LONGEST])

    def move(self, start: int, length: int) -> None:
        """Take note that the range lies elsewhere now."""
        if self._number >= 0:
            _library().aiouffd_note_move(self._number, start, start + length)

    def close(self) -> None:
        """Say nothing any more."""
        number, self._number = self._number, -1
        if number >= 0:
            _library().aiouffd_note_drop(number)

    @until_exit
    def __del__(self) -> None:
        self.close()
