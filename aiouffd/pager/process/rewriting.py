"""How a journal's log is written anew, in slices, while the worker serves.

A log grows with each change, and holds much that is over. So once it is twice as long as what it says, that is written
to the other log: what is known besides, all origins, and the spaces one by one, of which a large one takes many slices.
In between, the worker goes on: what it appends to the active log is appended to the new one as well, as far as that has
written what it is about.

A space whose mappings are half written has a frontier: what lies below is in the new log, what lies above is not yet.
An event that removes or unmaps is right for both parts: in the new log it changes what is there, and the rest is
written later, as the event has left it. An event that moves memory across the frontier, or copies it, is not: before
one, the rest of the space is written at once. So it is before one that removes of a file which others may map as well:
the new log must say which offsets that are.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from aiouffd.errors import PagerError
from aiouffd.kernel import abi
from aiouffd.pager.process.journal import JournalFullError
from aiouffd.pager.process.state import Kind, encode

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aiouffd.engine.dispatcher import Dispatcher
    from aiouffd.engine.mappings import Mappings
    from aiouffd.engine.space import Space
    from aiouffd.errors import UffdError
    from aiouffd.pager.process.journal import Journal
    from aiouffd.pager.process.state import SpaceState, State

__all__ = ["Rewriting", "Room"]

_LEAST: Final = 1 << 17  # bytes of a log that is not worth the work: it is read in some 50 ms, while nobody serves
_ROWS: Final = 2000  # mappings that are written at a time: 100 us
_SLICE_NS: Final = 1_000_000
_PAUSE: Final = 0.004  # seconds between two slices
_WHOLE: Final = 1 << 62
_ACROSS: Final = (abi.EVENT_REMAP, abi.EVENT_FORK)
_NO_ROOM: Final = "journal"  # why a space is not read
_COMMON: Final = (Kind.META, Kind.ORIGIN, Kind.RETIRED, Kind.NOTE, Kind.FORGOTTEN)


class Rewriting:
    """Watches over the length of a journal's log. Used on the worker's loop.

    Args:
        journal: its `mirror`, `threshold` and `on_growth` are this object's.
        loop: on which slices are run.
        state: returns what is known besides spaces, and the identities of all spaces.
        space: returns a space as it is now; None: it is served no longer.
        on_full: called when there is no room for what may come, even in a log that was written anew.
    """

    def __init__(
        self,
        journal: Journal,
        loop: asyncio.AbstractEventLoop,
        *,
        state: Callable[[], State],
        space: Callable[[int], SpaceState | None],
        on_full: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._loop = loop
        self._state = state
        self._space = space
        self._on_full = on_full
        self._timer: asyncio.TimerHandle | None = None
        self._at = 0  # bytes that are written
        self._queue: list[int] = []  # spaces of which nothing is written
        self._begun: set[int] = set()  # those of which something is
        self._current: Mappings | None = None
        self._identity = -1  # of the current one
        self._frontier = 0
        self._failed = False  # there was no room: not tried again before something is closed
        journal.threshold = _LEAST
        journal.on_growth = self.grown

    @property
    def is_running(self) -> bool:
        """Whether a new log is being written."""
        return self._journal.mirror is not None

    def grown(self) -> None:
        """The log has reached its threshold: begin, hurry, or say that it is full, where it is time for that."""
        journal = self._journal
        if not self.is_running and not self._failed:
            self._begin()
        if journal.room < journal.capacity // 8:
            self.finish()
            if journal.room < journal.capacity // 16:
                self._on_full()

    def closed(self) -> None:
        """A space is served no longer: there may be room again."""
        self._failed = False

    def make_room(self) -> None:
        """Write the log anew, at once."""
        if not self.is_running and not self._failed:
            self._begin()
        self.finish()

    def finish(self) -> None:
        """Write all of the new log at once, if it was begun."""
        while self.is_running:
            self._write(_WHOLE)

    def _begin(self) -> None:
        state = self._state()
        self._queue, self._begun = list(state.spaces), set()
        self._current, self._identity, self._at = None, -1, 0
        state.spaces = {}
        self._journal.mirror = self
        self._append(state.encode())
        self._schedule()

    def _schedule(self) -> None:
        if self.is_running:
            self._timer = self._loop.call_later(_PAUSE, self._slice)

    def _slice(self) -> None:
        until = perf_counter_ns() + _SLICE_NS
        while self.is_running and perf_counter_ns() < until:
            self._write(_ROWS)
        self._schedule()

    def _write(self, rows: int) -> None:
        """Write a part of the current space, or begin the next one; at the end the new log becomes the active one."""
        if self._current is not None:
            self._write_mappings(rows)
        elif self._queue:
            self._begin_space(self._queue.pop(0))
        else:
            self._journal.change(self._at)
            room = self._journal.capacity - self._at
            self._journal.threshold = max(_LEAST, self._at + min(self._at, room // 2))
            self._stop()

    def _begin_space(self, identity: int) -> None:
        space = self._space(identity)
        if space is not None:
            self._identity = identity
            self._begun.add(identity)
            self._current, self._frontier = space.mappings, 0
            self._append(space.encode())

    def _write_whole(self, identity: int) -> None:
        """Write all of a space, if that has not been done."""
        if identity in self._queue:
            self._write_rest()
            self._queue.remove(identity)
            self._begin_space(identity)
        if identity == self._identity:
            self._write_rest()

    def _write_rest(self) -> None:
        while self._current is not None:
            self._write_mappings(_WHOLE)

    def _write_mappings(self, rows: int) -> None:
        assert self._current is not None
        data, end = self._current.pack(self._frontier, rows)
        if data:
            self._append(encode(Kind.MAPPINGS, self._identity, data))
            self._frontier = end
        else:
            self._current = None

    # What is being appended to the active log meanwhile

    def events(self, identity: int, events: list[tuple[bytes, int]]) -> None:
        """Append layout events to the new log, if it knows of their space."""
        space = self._space(identity) if any(message[0] == abi.EVENT_REMOVE for message, _ in events) else None
        if space is not None and space.file:
            self._write_whole(identity)
        if identity not in self._begun:
            self._queue += [child for _, child in events if child >= 0]  # written by themselves
            return
        if identity == self._identity and any(message[0] in _ACROSS for message, _ in events):
            self._write_rest()
        self._begun.update(child for _, child in events if child >= 0)
        self._append(b"".join(encode(Kind.EVENT, identity, message, child=child) for message, child in events))

    def record(self, kind: Kind, identity: int, content: bytes) -> None:
        """Append any other record to the new log, if it knows of what that is about."""
        if kind is Kind.SPACE:
            self._begun.add(identity)
        elif kind is Kind.CLOSED and identity == self._identity:
            self._current = None
        if kind in _COMMON or identity in self._begun:
            self._append(encode(kind, identity, content))

    def _append(self, data: bytes) -> None:
        if not self.is_running:
            return
        try:
            self._at = self._journal.write_anew(self._at, data)
        except JournalFullError:  # what is said is too much for a log; the active one stays
            self._failed = True
            self._stop()

    def _stop(self) -> None:
        self._journal.mirror = None
        self._current, self._queue = None, []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Room:
    """Has spaces wait for which a journal has no room: those that need most of it first.

    Args:
        dispatcher: reads them.
        journal: see there.
        error: called with a space that waits, and why.
    """

    def __init__(self, dispatcher: Dispatcher, journal: Journal, error: Callable[[Space, UffdError], None]) -> None:
        self._dispatcher = dispatcher
        self._journal = journal
        self._error = error

    def full(self) -> None:
        """Read no more of the space that needs most of the journal; of all of them, where even that is too late."""
        held = self._dispatcher.held(_NO_ROOM)
        spaces = [space for space in self._dispatcher.spaces.values() if space not in held]
        spaces.sort(key=lambda space: len(space.mappings), reverse=True)
        for space in spaces if self._journal.room <= 0 else spaces[:1]:
            self._dispatcher.hold(space, _NO_ROOM)
            error = PagerError(
                f"its memory is in {len(space.mappings)} pieces, and the pager's journal has no room for more: its"
                " layout changes and page faults wait until other memory is served no longer"
            )
            self._error(space, error)

    @property
    def awaited(self) -> bool:
        """Whether a space waits."""
        return bool(self._dispatcher.held(_NO_ROOM))

    def release(self, make_room: Callable[[], None]) -> None:
        """Something is served no longer: there may be room again, once `make_room` was called."""
        held = self._dispatcher.held(_NO_ROOM)
        if held:
            make_room()
        if held and self._journal.room > self._journal.capacity // 8:
            for space in held:
                self._dispatcher.release(space, _NO_ROOM)
