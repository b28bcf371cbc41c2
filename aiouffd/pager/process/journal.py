"""What a worker knows, kept where its successor finds it: in memory that keeper, worker and application share.

A fault that was read and not resolved is no loss: WAKE brings it back. A layout event is: the kernel tells it once.
So messages land in this memory by the read itself, and a worker that dies right behind its read has left them here.

The content, in a memfd:

- the version of all this, and which of the pager's descriptors are whose (`Whose`).
- one commit word. It names the active landing and the active log, and the log's length. A single aligned 64-bit store
  changes all three at once, so that there is no moment in between for a kill to hit.
- two landings: where read(2) puts messages. Layout events are first appended to the log; then the other landing is
  cleared, and the commit word is stored, which makes that one the active one. What the active landing holds has
  therefore never been applied.
- two logs of records (`state`). What changes is appended to the active one. A log that has grown is written anew into
  the other one, by and by (`rewriting`), which is the active one then.
- counters (`engine.statistics`): the pager's own, and behind them a slot for each tenant that is counted by itself.

Only keeper and worker can write: the memfd is sealed before the application gets it, whose forked children have it too.

The log keeps room for the events of some reads at any time. Where even a log that was written anew has no room for
more, nothing is read any further (`Rewriting.on_full`): the kernel keeps what was not read, and its threads wait.
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import mmap
import os
from array import array
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from aiouffd.engine.statistics import SIZE as COUNTERS_SIZE
from aiouffd.engine.statistics import Counter, Counters
from aiouffd.errors import PagerStartError
from aiouffd.kernel import abi
from aiouffd.kernel.events import MESSAGES
from aiouffd.kernel.memory import map_file
from aiouffd.pager.process.handles import explained, open_memfd
from aiouffd.pager.process.state import EVENT_SIZE, Kind, Record, encode, records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiouffd.engine.space import Space

__all__ = ["SLOTS", "VERSION", "Claim", "Content", "Journal", "JournalFullError", "Mirror", "Whose"]

VERSION: Final = 1
"""Of the format. The one before, 0, has neither notes nor a version; both are read."""

_VERSION: Final = 1  # its word; the commit word is 0
_PROVISIONAL: Final = 5  # in each version: see `Claim`
_DONE: Final = 8
_LISTENS: Final = 9
_WORKERS: Final = 10
_LANDING: Final = 4096
_LANDING_STRIDE: Final = 4096
_LANDING_MESSAGES: Final = 64  # behind the identity of the space that is being read
_COUNTERS: Final = 12288
_LOGS: Final = 1 << 20
SLOTS: Final = (_LOGS - _COUNTERS) // COUNTERS_SIZE
"""So many arrays of counters there are; the first is the pager's own."""
_LOG_SIZE: Final = 64 << 20  # sparse: what is not written costs nothing
_KEPT_FREE: Final = 33 * MESSAGES * EVENT_SIZE  # for what is read until the dispatcher takes note that it is full

_LAYOUT: Final = frozenset((abi.EVENT_FORK, abi.EVENT_REMAP, abi.EVENT_REMOVE, abi.EVENT_UNMAP))
_GAUGES: Final = (Counter.IN_FLIGHT, Counter.BYTES_IN_FLIGHT, Counter.SPACES)
_ENDS: Final = (Kind.CLOSED, Kind.RETIRED, Kind.FORGOTTEN)
_F_SEAL_FUTURE_WRITE: Final = 0x10  # Linux 5.1: the mappings that are there already can be written on
_SEALS: Final = _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Whose(enum.IntEnum):
    """Words that hold the number of a descriptor in the pager's table; 0: there is none."""

    WORKER = 2  # pidfds: written by the clone that makes the process
    KEEPER = 6
    HOLDER = 7
    LIFELINE = 3  # the connection to the holder whose all is while this pager is provisional


class JournalFullError(Exception):
    """There is no room for a record. Nothing was written."""


class Content(NamedTuple):
    """What a journal says.

    Attributes:
        records: of the log.
        identity: the space whose messages landed last.
        landed: layout events that were read, and not committed: their reader died right then.
    """

    records: list[Record]
    identity: int
    landed: list[bytes]


class Mirror(Protocol):
    """Writes the log anew."""

    def events(self, identity: int, events: list[tuple[bytes, int]]) -> None:
        """Take note of layout events that are about to be appended, and then applied; with the forked children."""

    def record(self, kind: Kind, identity: int, content: bytes) -> None:
        """Take note of any other record."""


class Claim:
    """The journal of another pager that is about to have all, of whatever version: the word that says whose all is.

    It has the same place in each version. So what is older than that pager gives to it.

    Args:
        fd: the memfd. It stays the caller's, who may close it.
    """

    def __init__(self, fd: int) -> None:
        self._words = memoryview(map_file(fd, _LANDING, mmap.ACCESS_READ)).cast("Q")

    @property
    def provisional(self) -> bool:
        """As `Journal.provisional`."""
        return bool(self._words[_PROVISIONAL])


class Journal:
    """The shared memory; one process writes it at a time.

    Args:
        fd: the memfd of one made by `create`. It stays the caller's, who may close it: the mapping keeps the memory.
        access: mmap.ACCESS_WRITE for its maker; it is sealed for all others.

    Raises:
        PagerStartError: it is of a version that this one does not read.

    Attributes:
        counters: the pager's own, in this memory.
        mirror: told of what is appended, before it counts, while the log is being written anew.
        threshold: the size from which on `on_growth` is called before the next read.
        on_growth: called then; all events that were committed have been applied.
        next_identity: returns the identity that the next forked child gets.
        keep: called with the identity and the descriptor of a forked child, before its fork is in the log.
    """

    def __init__(self, fd: int, access: int = mmap.ACCESS_READ) -> None:
        self.fd = fd
        size = os.fstat(fd).st_size
        self._map = map_file(fd, size, access)
        self._map.madvise(mmap.MADV_DONTDUMP)  # a core dump would write out its holes, too
        self._bytes = memoryview(self._map)
        self._size = (size - _LOGS) // 2
        self._words = self._bytes[:_LANDING].cast("Q")
        self._numbers = self._bytes[:_LANDING].cast("i")  # a half of a word each
        if self._words[_VERSION] > VERSION:
            raise PagerStartError(
                f"a journal of version {self._words[_VERSION]} cannot be read: this aiouffd ({VERSION}) is older"
            )
        self._identities = [self._bytes[at : at + 8].cast("q") for at in map(_landing, (0, 1))]
        self._landings = [
            self._bytes[at + _LANDING_MESSAGES : at + _LANDING_MESSAGES + MESSAGES * abi.MESSAGE_SIZE]
            for at in map(_landing, (0, 1))
        ]
        self._logs = [self._bytes[at : at + self._size] for at in (_LOGS, _LOGS + self._size)]
        self.counters: Counters = self.counters_of(0)
        self.mirror: Mirror | None = None
        self.threshold = size
        self.on_growth: Callable[[], Any] = _nothing
        self.next_identity: Callable[[], int] = _nothing
        self.keep: Callable[[int, int], Any] = _nothing
        self._has_grown = False

    @classmethod
    def create(cls) -> Journal:
        """Make an empty one.

        Raises:
            PagerStartError: there is no room for it; it says why.
        """
        fd = open_memfd("aiouffd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _LOGS + 2 * _LOG_SIZE)
            journal = cls(fd, mmap.ACCESS_WRITE)
            journal._words[_VERSION] = VERSION
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            raise explained(f"no journal of {2 * _LOG_SIZE >> 20} MiB", error) from error
        return journal

    def descriptor(self, whose: Whose) -> int:
        """Return the number of a descriptor in the pager's table; -1: there is none."""
        return self._numbers[2 * whose] or -1

    def note_descriptor(self, whose: Whose, fd: int) -> None:
        """Note such a number; -1: there is none."""
        self._numbers[2 * whose] = max(fd, 0)

    @property
    def descriptors(self) -> set[int]:
        """All such numbers."""
        return {self.descriptor(whose) for whose in Whose} - {-1}

    def place(self, whose: Whose) -> ctypes.c_int:
        """Return where such a number is, for the kernel to write it. For who has made this journal."""
        return ctypes.c_int.from_buffer(self._map, 8 * whose)

    @property
    def provisional(self) -> bool:
        """Whether nothing may be read yet: all is another pager's still. That it is not is one store, seen by both."""
        return bool(self._words[_PROVISIONAL])

    @provisional.setter
    def provisional(self, value: bool) -> None:
        self._words[_PROVISIONAL] = value

    @property
    def done(self) -> bool:
        """Whether the pager has ended by itself, or is about to: no process that has ended is made anew."""
        return bool(self._words[_DONE])

    @done.setter
    def done(self, value: bool) -> None:
        self._words[_DONE] = value

    @property
    def listens(self) -> bool:
        """Whether the holder answers successors, as its owner has told it."""
        return bool(self._words[_LISTENS])

    @listens.setter
    def listens(self, value: bool) -> None:
        self._words[_LISTENS] = value

    @property
    def workers(self) -> int:
        """How many workers have begun."""
        return self._words[_WORKERS]

    @workers.setter
    def workers(self, value: int) -> None:
        self._words[_WORKERS] = value

    # Counters

    def counters_of(self, slot: int) -> Counters:
        """Return the counters in a slot below `SLOTS`."""
        at = _COUNTERS + slot * COUNTERS_SIZE
        return Counters(self._bytes[at : at + COUNTERS_SIZE])

    @property
    def all_counters(self) -> list[Counters]:
        """The pager's own counters, and those of each slot that was used."""
        return [self.counters, *map(self.counters_of, range(1, self.counters.words[Counter.SLOTS] + 1))]

    def total(self, counter: Counter) -> int:
        """Return what all slots have counted together."""
        return sum(counters.words[counter] for counters in self.all_counters)

    def progress(self) -> int:
        """Return a number that goes up whenever a thread that waited is let go by this pager; 0 where none was.

        It is not another one because a tenant comes or leaves, or brings what it was counted for by other pagers.
        """
        own = sum(counters.progress() - counters.words[Counter.INHERITED] for counters in self.all_counters)
        return own + self.counters.words[Counter.ENDED]

    def use_slot(self, slot: int, counts: list[int], user: int = 0) -> None:
        """Have a slot begin with these counts. The pager's own counters go on as they are.

        Where the same user, who has a number, is counted there already, none goes back: it may be asked for twice, or
        by one who does not know yet what others of the same user have been counted for.

        What is under way there is not forgotten: the reads of one who has left end later, and count down then.
        """
        if slot:
            words, counters = self.counters.words, self.counters_of(slot)
            if user and counters.words[Counter.USER] == user:
                counts = _most(counters, counts)
            made = counters.progress() - counters.words[Counter.INHERITED]
            under_way = [counters.words[gauge] for gauge in _GAUGES]
            _inherit(counters, counts)
            if user:
                counters.words[Counter.USER] = user
            for gauge, now in zip(_GAUGES, under_way, strict=True):
                counters.words[gauge] = now
            words[Counter.SLOTS] = max(words[Counter.SLOTS], slot)
            words[Counter.ENDED] += max(made, 0)

    def resume(self, counts: list[int], slots: Iterable[tuple[int, list[int]]] = ()) -> None:
        """Have the pager's own counters go on where those of a predecessor have stopped, and those in slots.

        It may be asked for twice, if a worker has died meanwhile: none goes back.
        """
        _inherit(self.counters, _most(self.counters, counts))
        for slot, its in slots:
            self.use_slot(slot, _most(self.counters_of(slot), its))

    def take_counters(self, predecessor: Journal) -> None:
        """Go on counting where a predecessor has stopped."""
        for slot, counters in enumerate(predecessor.all_counters):
            _inherit(self.counters_of(slot), counters.words.tolist())

    def begin_anew(self) -> None:
        """Forget what a predecessor had under way: it is no more."""
        for counters in self.all_counters:
            _begin_anew(counters.words)

    # Writing

    def before_reading(self) -> None:
        """Call `on_growth` where the log has passed the threshold."""
        if self._has_grown:
            self._has_grown = False
            self.on_growth()

    @property
    def buffer(self) -> memoryview:
        """The active landing, for the next read."""
        # Of the shared word, not of this object: a worker is forked from the keeper, whose object is unchanged.
        return self._landings[self._words[0] & 1]

    @property
    def identity(self) -> memoryview:
        """The word of the active landing that says whose messages land there."""
        return self._identities[self._words[0] & 1]

    def commit(self, space: Space, layout: list[bytes]) -> None:
        """Append layout events to the log, and change the landing."""
        self.commit_events(space.identity, layout)

    def commit_events(self, identity: int, layout: list[bytes]) -> None:
        """As `commit`. There is room for the events of a read at any time: it is not begun else."""
        child = self.next_identity()
        events = []
        for message in layout:
            is_fork = message[0] == abi.EVENT_FORK
            events.append((message, child if is_fork else -1))
            if is_fork:
                self.keep(child, *abi.FORK_MESSAGE.unpack(message))
            child += is_fork
        if self.mirror is not None:
            self.mirror.events(identity, events)
        self._put(b"".join(encode(Kind.EVENT, identity, message, child=child) for message, child in events))

    def append(self, *items: tuple[Kind, int, bytes]) -> None:
        """Append records, which count together: kind, identity and content of each.

        Raises:
            JournalFullError: there is no room. What ends something has room at any time.
        """
        data = b"".join(encode(kind, identity, content) for kind, identity, content in items)
        if len(data) > self.room and any(kind not in _ENDS for kind, _, _ in items):
            raise JournalFullError
        for item in items if self.mirror is not None else ():
            self.mirror.record(*item)  # type: ignore[union-attr]
        self._put(data)

    @property
    def size(self) -> int:
        """Bytes of the active log."""
        return self._words[0] >> 2

    @property
    def capacity(self) -> int:
        """Bytes that a log may have."""
        return self._size - _KEPT_FREE

    @property
    def room(self) -> int:
        """Bytes that may still be appended, without those that are kept for events."""
        return self.capacity - self.size

    def write_anew(self, at: int, data: bytes) -> int:
        """Write into the inactive log; return where the next goes.

        Raises:
            JournalFullError: there is no room.
        """
        if at + len(data) > self.capacity:
            raise JournalFullError
        self._logs[~(self._words[0] >> 1) & 1][at : at + len(data)] = data
        return at + len(data)

    def change(self, size: int) -> None:
        """Make the inactive log the active one; it has `size` bytes. What the active landing holds is lost."""
        word = self._words[0]
        landing = self._clear_other(word)
        self._words[0] = size << 2 | (~word & 2) | landing

    def _put(self, data: bytes) -> None:
        word = self._words[0]
        at = word >> 2
        self._logs[word >> 1 & 1][at : at + len(data)] = data
        landing = self._clear_other(word)
        self._words[0] = (at + len(data)) << 2 | (word & 2) | landing
        self._has_grown = at + len(data) >= self.threshold

    def _clear_other(self, word: int) -> int:
        """Make the inactive landing ready to be the active one; return which it is."""
        other = ~word & 1
        self._landings[other][:] = bytes(len(self._landings[other]))
        self._identities[other][0] = self._identities[word & 1][0]
        return other

    # Reading

    def load(self) -> Content:
        """Return what it says now."""
        word = self._words[0]
        landing = self._landings[word & 1]
        messages = (bytes(landing[at : at + 32]) for at in range(0, MESSAGES * abi.MESSAGE_SIZE, abi.MESSAGE_SIZE))
        landed = [message for message in messages if message[0] in _LAYOUT]
        log = list(records(self._logs[word >> 1 & 1][: word >> 2]))
        return Content(log, self._identities[word & 1][0], landed)


def _inherit(counters: Counters, counts: list[int]) -> None:
    """Go on counting from these counts on, of which nothing is progress that was made here."""
    begin = Counters()
    begin.words[: len(counts)] = array("Q", counts)
    begin.words[Counter.INHERITED], begin.words[Counter.ENDED] = begin.progress(), 0
    _begin_anew(begin.words)
    counters.words[:] = begin.words


def _most(counters: Counters, counts: list[int]) -> list[int]:
    return [max(pair) for pair in zip_longest(counters.words, counts, fillvalue=0)]


def _begin_anew(words: memoryview) -> None:
    for gauge in (Counter.IN_FLIGHT, Counter.BYTES_IN_FLIGHT, Counter.SPACES, Counter.RESIDENT):
        words[gauge] = 0


def _landing(index: int) -> int:
    return _LANDING + index * _LANDING_STRIDE


def _nothing(*_: int) -> int:
    return 0
