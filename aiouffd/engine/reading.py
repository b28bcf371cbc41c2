"""How the messages of many descriptors are read, and plain faults served, before the engine hears of anything.

Sleeping in epoll and being woken costs more than the rest of a fault. So after a fault the reader looks again for up
to `spin_us`, but only while faults keep coming: after a fault that comes long after the last one it sleeps at once, and
looks in vain make the next ones rarer. It looks at all descriptors, not at the one that was readable: with a thousand
clients the next fault comes from another.

Descriptors take turns, of a few messages each: that which has got fewest comes next, and while it has none, it saves
nothing up. So a fault of a client that seldom has one waits for one turn of another, however many faults others have.
One descriptor alone is read in as few reads as possible.

There are two readers with the same rules. `NativeReader` runs in the native part without the GIL, and returns when a
message is not plain or the loop is due for a turn. `PythonReader` serves where there is no native part.

O_NONBLOCK belongs to the open file, not to the descriptor: the process that has handed a descriptor over can clear it
at any time. A plain read would block the loop then, and with it all other spaces. So each read passes RWF_NOWAIT. A
userfaultfd knows that flag since Linux 6.10; before, and where a seccomp filter forbids preadv2(2), O_NONBLOCK is the
only protection.
"""

from __future__ import annotations

import ctypes
import os
import select
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import attrs

from aiouffd import native
from aiouffd.engine.plain import SLOT, FastPath, PlainFaults
from aiouffd.engine.statistics import Counter
from aiouffd.kernel import abi
from aiouffd.kernel.events import MESSAGES
from aiouffd.kernel.memory import address_of
from aiouffd.native import reader as c

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from aiouffd.engine.bound import Bound
    from aiouffd.engine.kept import Kept
    from aiouffd.engine.one_copy import OneCopy
    from aiouffd.engine.plain import PlainSource
    from aiouffd.engine.readahead import NotePages
    from aiouffd.engine.space import Space
    from aiouffd.engine.statistics import Counters

__all__ = ["MakeReader", "NativeReader", "PythonReader", "Reader", "make_reader"]

_MAX_READY = 32  # descriptors in one look: epoll allocates room for so many
_TURN = 4 * abi.MESSAGE_SIZE  # bytes: some 30 us of faults; a read and a look take 4 us
_WHOLE = MESSAGES * abi.MESSAGE_SIZE
_VAIN_LOOKS_UNTIL_RARER = 3
_MAX_SKIPPED = 64
_NO_LIMIT = 1 << 62  # pages
_NOT_BLOCKING = os.RWF_NOWAIT
_preadv, _readv = os.preadv, os.readv
_WORDS = [Counter[name] for name in c.WORDS]


class Reader(PlainFaults, Protocol):
    """Reads descriptors that were admitted, and serves the plain faults of those that are open."""

    spin_ns: int

    def admit(self, fd: int, identity: int, counters: Counters) -> None:
        """Read a descriptor from now on; `identity` is noted where its messages land. Its faults are counted."""

    def dismiss(self, fd: int) -> None:
        """Read a descriptor no longer; it is about to be closed."""

    def refresh(self, space: Space) -> None:
        """Take note of what the readahead of a space has just learned."""

    def only(self, fd: int) -> None:
        """Say that this is the only descriptor there is; -1: there are others, or none."""

    def land(self, buffer: memoryview, identity: memoryview) -> None:
        """Say where messages are to land from now on, and where to note whose they are."""

    def read_without_flags(self) -> None:
        """Rely on O_NONBLOCK from now on, and read by readv(2): RWF_NOWAIT, or preadv2(2) itself, is refused."""

    def run(self, turn_ns: int, *, came: bool, once: bool, fd: int = -1) -> tuple[int, Any]:
        """Read and serve; return an `Outcome`, and what was found for the engine.

        That has `fd`, `length` (bytes of messages, at the beginning of the landing), `error` (the errno of the read)
        and `events` (what epoll said).

        Args:
            turn_ns: nanoseconds until the loop is due for a turn.
            came: the engine has served something just now, so look for more for a while.
            once: look once.
            fd: read no other descriptor; -1: any.
        """

    def turns(self, fds: Iterable[int]) -> dict[int, int]:
        """Return a number for each descriptor that was admitted: another one whenever messages of it have been read."""

    def end(self) -> None:
        """Free what it holds; it is not used again."""


MakeReader: TypeAlias = "Callable[[select.epoll, Mapping[int, Space]], Reader]"


def make_reader(epoll: select.epoll, spaces: Mapping[int, Space]) -> Reader:
    """Return a reader of this epoll set: the native one, where there is a native part."""
    return PythonReader(epoll, spaces) if native.reason() else NativeReader(epoll)


class _Found(NamedTuple):
    fd: int = -1
    length: int = 0
    error: int = 0
    events: int = 0


class PythonReader(FastPath):
    """The reader for a machine without the native part."""

    def __init__(self, epoll: select.epoll, spaces: Mapping[int, Space]) -> None:
        super().__init__(spaces)
        self.spin_ns = 0
        self._epoll = epoll
        self._has_flags = True
        self._only: tuple[tuple[int, int], ...] | None = None
        self._landing = self._identity = memoryview(b"")
        self._buffers: list[memoryview] = []  # of one read
        self._turns: dict[int, int] = {}  # of each descriptor: its next one
        self._turn = 0  # that of the descriptor that was read last
        self._last_ns = 0
        self._vain = 0
        self._skip = 0

    def refresh(self, space: Space) -> None:
        """Do nothing: the readahead itself is asked for each fault."""

    def only(self, fd: int) -> None:
        """Do without epoll where there is one descriptor."""
        self._only = ((fd, 0),) if fd >= 0 else None
        self._buffers = [self._landing[: _read_size(fd)]]

    def land(self, buffer: memoryview, identity: memoryview) -> None:
        """Have messages land there."""
        self._landing, self._identity = buffer, identity
        self._buffers = [buffer[: _read_size(self._only[0][0] if self._only else -1)]]

    def read_without_flags(self) -> None:
        """Read by readv(2)."""
        self._has_flags = False

    def run(self, turn_ns: int, *, came: bool, once: bool, fd: int = -1) -> tuple[int, Any]:
        """Read and serve."""
        now = perf_counter_ns()
        due = now + turn_ns
        until = now + self._patience(now) if came else now
        looking = came
        while True:
            found = self._look(fd)
            if isinstance(found, _Found):
                return (c.Outcome.FAILED if found.error else c.Outcome.MESSAGES), found
            now = perf_counter_ns()
            if found:
                if looking:
                    self._vain = 0
                until = now + self._patience(now)
                looking = True
            elif once:
                return c.Outcome.IDLE, None
            elif now >= until:
                if looking and until > self._last_ns:
                    self._vain += 1
                    self._skip = min(1 << self._vain, _MAX_SKIPPED) if self._vain >= _VAIN_LOOKS_UNTIL_RARER else 0
                return c.Outcome.IDLE, None
            if now >= due:
                return c.Outcome.DUE, None

    def _patience(self, now: int) -> int:
        """Return for how many nanoseconds to look again after a fault: only while faults keep coming."""
        gap = now - self._last_ns
        self._last_ns = now
        if gap > 2 * self.spin_ns:  # a look after the last one would have been in vain
            return 0
        if self._skip:
            self._skip -= 1
            return 0
        return self.spin_ns

    def _turn_of(self, ready: tuple[int, int]) -> int:
        """Return when the turn of a descriptor comes: see `take_turn` of the native part."""
        return self._turns.get(ready[0], 0)

    def _look(self, only: int) -> bool | _Found:
        """Read once from the descriptor whose turn it is; tell whether something came, or what is for the engine."""
        ready = ((only, 0),) if only >= 0 else self._only or sorted(self._epoll.poll(0, _MAX_READY), key=self._turn_of)
        for fd, events in ready:
            slot = SLOT.unpack_from(self.slots, fd * SLOT.size)
            if slot[0] < 0:
                continue  # dropped just now
            self._turn = max(self._turn, self._turns.get(fd, 0))
            self._identity[0] = slot[0]
            try:
                length = _preadv(fd, self._buffers, -1, _NOT_BLOCKING) if self._has_flags else _readv(fd, self._buffers)
            except BlockingIOError:
                length = 0
            except OSError as error:
                return _Found(fd, 0, error.errno or 0, events)
            if length:
                self._turns[fd] = self._turn + length // abi.MESSAGE_SIZE
            if length and not (length == abi.MESSAGE_SIZE and self.serve(fd, slot, self._buffers[0])):
                return _Found(fd, length, 0, events)
            if events & select.EPOLLERR:
                return _Found(fd, 0, 0, events)
            if length:
                return True
        return False

    def turns(self, fds: Iterable[int]) -> dict[int, int]:
        """Return the turns that these descriptors have had."""
        return {fd: self._turns.get(fd, 0) for fd in fds}

    def end(self) -> None:
        """Do nothing."""


@attrs.define(eq=False, repr=False)
class _Line:
    """What the native part knows of a descriptor.

    Attributes:
        identity: noted where its messages land.
        words: where its faults are counted.
        opened: start, end and offset of the mapping that is served, and its source; None: closed.
        served: whether the native part serves anything of it just now.
        bound: is asked for room, and told what has come; None: there is no limit.
        note: called with what has come; None: nobody records it.
        room: pages for which there is room.
        kept: of memory of which snapshots are taken.
        expected: where streams are expected, as the native part knows it.
    """

    identity: int
    words: memoryview
    opened: tuple[int, int, int, PlainSource] | None = None
    served: bool = False
    bound: Bound | None = None
    note: NotePages | None = None
    room: ctypes.c_uint64 = attrs.field(factory=ctypes.c_uint64)
    kept: Kept | None = None
    expected: list[int] = attrs.field(factory=list)


class NativeReader:
    """The reader of the native part.

    With readahead, it serves only faults that belong to no stream, one page each, and only once the readahead has found
    that neighbours are of no use. Faults near a known stream, or near one of the last faults, go to the engine. What is
    in a file that all map takes no memory, so neighbours are always of use there.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self._reader = c.NativeReader(epoll.fileno(), _WORDS)
        self._reader.configure(flags=_NOT_BLOCKING, limit=_read_size(-1))
        self._lines: dict[int, _Line] = {}
        self._logged: dict[int, _Line] = {}  # those that are served, and of which somebody asks what has come
        self._spin_ns = 0
        self._landing: tuple[memoryview, memoryview] | None = None  # kept alive
        self.run: Callable[..., tuple[int, Any]] = self._reader.run

    @property
    def spin_ns(self) -> int:
        """Nanoseconds to look again before sleeping."""
        return self._spin_ns

    @spin_ns.setter
    def spin_ns(self, value: int) -> None:
        if value != self._spin_ns:
            self._spin_ns = value
            self._reader.configure(spin_ns=value)

    def admit(self, fd: int, identity: int, counters: Counters) -> None:
        """Read a descriptor."""
        self._lines[fd] = _Line(identity, counters.words)
        self._reader.describe(fd, identity=identity)

    def dismiss(self, fd: int) -> None:
        """Read it no longer."""
        line = self._lines.pop(fd, None)
        if line is not None:
            self._forget_logged(fd)
            self._reader.describe(fd, identity=-1)
            if line.kept is not None:
                self._reader.keep(fd, None)

    def _forget_logged(self, fd: int) -> None:
        if self._logged.pop(fd, None) is not None and not self._logged:
            self.run = self._reader.run

    def open(
        self,
        fd: int,
        start: int,
        end: int,
        offset: int,
        source: PlainSource,
        bound: Bound | None = None,
        note: NotePages | None = None,
    ) -> None:
        """Serve a mapping."""
        line = self._lines.get(fd)
        if line is None:  # it is not read just now
            return
        opened = start, end, offset, source
        if line.served:
            if (line.opened, line.bound, line.note) == (opened, bound, note):
                return
            self._hide(fd, line)  # it lies elsewhere
        line.bound, line.note, line.opened = bound, note, opened
        readahead = source[4]
        if not readahead:
            self._describe(fd, line, near=0)

    def _run_logged(self, turn_ns: int, *, came: bool, once: bool, fd: int = -1) -> tuple[int, Any]:
        """Run, with as much room as there is for memory with a limit, and say what has come."""
        for line in self._logged.values():
            line.room.value = _NO_LIMIT if line.bound is None else line.bound.share
        result = self._reader.run(turn_ns, came=came, once=once, fd=fd)
        for logged, pages in self._reader.came():
            line = self._logged[logged]
            assert line.opened is not None
            start, _, offset, source = line.opened
            skew = offset - start
            offsets = [page + skew for page in pages]
            if line.bound is not None:
                for at in offsets:
                    line.bound.came(at, source[2])
            if line.note is not None:
                line.note(offsets)
        return result

    def close(self, fd: int) -> None:
        """Serve nothing of it."""
        line = self._lines.get(fd)
        if line is not None:
            line.opened = None
            self._hide(fd, line)

    def keep(self, fd: int, kept: Kept) -> None:
        """Let first writes go on."""
        line = self._lines.get(fd)
        if line is not None:
            line.kept = kept  # what is in use stays alive
            self._reader.keep(fd, kept.native)

    def refresh(self, space: Space) -> None:
        """Serve strangers if the readahead has found that it is of no use to them."""
        fd = space.uffd.fileno()
        line = self._lines.get(fd)
        if line is None or line.opened is None or not space.readahead.limit:
            return
        readahead = space.readahead
        if not (readahead.is_at_random or line.opened[3][0] is None):
            self._hide(fd, line)
            return
        if not line.served:
            self._describe(fd, line, near=readahead.around)
            line.expected = []
        start, _, offset, _ = line.opened
        expected = [end + start - offset for pair in readahead.expected() for end in pair]
        if expected != line.expected:
            line.expected = expected
            self._reader.watch(fd, expected)

    def _describe(self, fd: int, line: _Line, *, near: int) -> None:
        assert line.opened is not None
        start, end, offset, (_, size, page, mode, _, _, memory) = line.opened
        if memory is None:
            return
        # The last, partial page is the engine's.
        whole = min(memory[1] if isinstance(memory, tuple) else size, size) & -page
        is_logged = line.bound is not None or line.note is not None
        self._reader.describe(
            fd,
            near=near,
            identity=line.identity,
            start=start,
            end=max(start, min(end, start + whole - offset)),
            page=page,
            mode=mode,
            **_where(memory, offset),
            room=ctypes.addressof(line.room) if is_logged else 0,
            words=address_of(line.words),
        )
        line.served = True
        if is_logged:
            self._logged[fd] = line
            self.run = self._run_logged

    def _hide(self, fd: int, line: _Line) -> None:
        if line.served:
            line.served = False
            self._forget_logged(fd)
            self._reader.describe(fd, identity=line.identity)

    def only(self, fd: int) -> None:
        """Do without epoll where there is one descriptor."""
        self._reader.configure(only=fd, limit=_read_size(fd))

    def land(self, buffer: memoryview, identity: memoryview) -> None:
        """Have messages land there."""
        self._landing = (buffer, identity)
        self._reader.configure(landing=address_of(buffer), identity=address_of(identity))

    def read_without_flags(self) -> None:
        """Read by readv(2)."""
        self._reader.configure(flags=0)

    def turns(self, fds: Iterable[int]) -> dict[int, int]:
        """Return the turns that these descriptors have had."""
        return self._reader.turns(fds)

    def end(self) -> None:
        """Free it."""
        self._reader.close()


def _read_size(only: int) -> int:
    """Return how many bytes of messages are read at once; `only`: the one descriptor that there is, or -1."""
    return _WHOLE if only >= 0 else _TURN


def _where(memory: tuple[int, int, int, int] | OneCopy, offset: int) -> dict[str, int]:
    """Return what the native part is told of where the bytes at an offset of the source are: see `struct line`."""
    nowhere = {"file": -1, "mapped": 0, "mtime_ns": 0, "used": 0}
    if not isinstance(memory, tuple):
        return {**nowhere, "shown": c.Shown.ONE_COPY, "source": memory.note_of(offset), "mapped": offset}
    address, _, file, number = memory
    nowhere["file"] = file
    if file >= 0:
        where = {"shown": c.Shown.FILE_PAGES, "source": offset, "mapped": address + offset, "mtime_ns": number}
    elif file == -1:
        where = {"shown": c.Shown.MEMORY, "source": address + offset}
    else:
        where = {"shown": c.Shown.MAPPED, "source": address + offset, "mapped": offset if number else 0, "used": number}
    return {**nowhere, **where}
