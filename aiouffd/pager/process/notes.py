"""What the pager's owner has to know of its clients, kept where the owner's successor finds it: in the journal.

The pager reads none of it, but for recordings of what it serves. It holds the descriptors open, and gives all of it to
whoever takes its clients over.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from aiouffd.errors import PagerStartError
from aiouffd.pager.process.journal import JournalFullError
from aiouffd.pager.process.state import RECORDING, Kind, Note

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.ahead.trace import Recorder

__all__ = ["Notes"]


class Notes:
    """The notes of a pager.

    Args:
        write: appends a record to the journal; what ends something has room at any time.
        close: closes descriptors, without blocking.

    Attributes:
        kept: by name.
    """

    def __init__(self, write: Callable[[tuple[Kind, int, bytes]], None], close: Callable[..., None]) -> None:
        self._write, self._close = write, close
        self.kept: dict[str, Note] = {}
        self._recorders: WeakValueDictionary[tuple[int, int], Recorder] = WeakValueDictionary()  # by file

    def keep(self, note: Note) -> None:
        """Keep a note in place of the last of its name. Its descriptors are taken.

        Raises:
            PagerStartError: the journal has no room for it.
        """
        try:
            self._write((Kind.NOTE, 0, note.content))
        except JournalFullError:
            self._close(*note.fds)
            raise PagerStartError("there is no room for another note: the pager's journal is full") from None
        known, self.kept[note.name] = self.kept.get(note.name), note
        if known is not None:
            self._close(*known.fds)

    def forget(self, name: str) -> None:
        """Keep a note no longer, if there is one."""
        note = self.kept.pop(name, None)
        if note is not None:
            self._write((Kind.FORGOTTEN, 0, name.encode()))
            self._close(*note.fds)

    def recorder(self, token: str) -> Recorder | None:
        """Return what notes the touches of all that is served from a source, by the token of that; None: nothing."""
        note = self.kept.get(RECORDING + token)
        if note is None:
            return None
        file = os.fstat(note.fds[0])
        recorder = self._recorders.get((file.st_dev, file.st_ino))
        if recorder is None:
            from aiouffd.engine.ahead.trace import Recorder  # noqa: PLC0415 - few pagers record

            recorder = Recorder(os.dup(note.fds[0]), most=note.text["most"])
            self._recorders[file.st_dev, file.st_ino] = recorder
        return recorder
