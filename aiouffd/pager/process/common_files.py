"""The files of memory that a worker's spaces map, and when these are read.

What one of the spaces empties counts for each of them, also for one that waits until its source has been opened again.
Where another pager is asked for them, one by one, none is read before it has been asked for all: what that one empties
would not count for one that comes later, with what it has shown before.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from aiouffd.engine.common_file import CommonFile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.engine.dispatcher import Dispatcher
    from aiouffd.engine.space import Space
    from aiouffd.pager.process.state import Meta, SpaceState

__all__ = ["CommonFiles"]

_OTHERS = "others"  # why a space is not read: others that map its file are still to come


class _Served(Protocol):
    """What is needed of `Served`."""

    meta: Meta
    waiting: dict[int, SpaceState]
    dispatcher: Dispatcher

    def note_meta(self, **changes: Any) -> None: ...


class CommonFiles:
    """Used on the worker's loop.

    Args:
        worker: what it serves.
    """

    def __init__(self, worker: _Served) -> None:
        self._worker = worker
        self._known: WeakValueDictionary[str, CommonFile] = WeakValueDictionary()

    def of(self, name: str) -> CommonFile | None:
        """Return the one of a name; None: it is empty."""
        if not name:
            return None
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = CommonFile(name, partial(self._waiting, name))
        return known

    def _waiting(self, name: str) -> list[SpaceState]:
        return [state for state in self._worker.waiting.values() if state.file == name]

    def await_more(self, *names: str) -> None:
        """Read no space that maps one of these files, until another call leaves it out. A successor does so, too."""
        if names or self._worker.meta.files:
            self._worker.note_meta(files=list(names))
            self.served(())

    def served(self, spaces: Iterable[Space]) -> None:
        """Have those read that have come just now, and those that have waited for them, unless others are awaited."""
        awaited = self._worker.meta.files
        for space in spaces:
            if space.file is not None and space.file.name in awaited:
                self._worker.dispatcher.hold(space, _OTHERS)
        for space in self._worker.dispatcher.held(_OTHERS):
            if space.file is None or space.file.name not in awaited:
                self._worker.dispatcher.release(space, _OTHERS)
