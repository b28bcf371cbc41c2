"""How long the reader in Python looks again, over a pipe in place of a descriptor; what the native part is told."""

from __future__ import annotations

import errno
import os
import select
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from aiouffd.engine import reading
from aiouffd.engine.reading import NativeReader, PythonReader
from aiouffd.engine.statistics import Counter, Counters
from aiouffd.kernel import abi
from aiouffd.kernel.events import MESSAGES
from aiouffd.kernel.memory import address_of
from aiouffd.native.reader import WORDS, Outcome, Shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.engine.plain import PlainSource

TURN = 10_000_000_000
START = 0x7000_0000_0000
ADDRESS = 0x5000_0000_0000
PAGE = 4096


@pytest.fixture
def rig() -> Iterator[tuple[PythonReader, int]]:
    """Return a reader of the reading end of a pipe, and the writing end."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    epoll = select.epoll()
    epoll.register(reading, select.EPOLLIN)
    reader = PythonReader(epoll, {})
    reader.land(memoryview(bytearray(MESSAGES * abi.MESSAGE_SIZE)), memoryview(bytearray(8)).cast("q"))
    reader.admit(reading, 1, Counters())
    yield reader, writing
    epoll.close()
    os.close(reading)
    os.close(writing)


def test_looking_again_is_for_as_long_as_faults_keep_coming(rig: tuple[PythonReader, int]) -> None:
    """A fault long after the last is followed by sleep; soon after, by a look; skipped ones by none."""
    reader, _ = rig
    assert reader.spin_ns == 0
    reader.spin_ns = 50_000
    assert reader._patience(10_000_000) == 0
    assert reader._patience(10_000_000 + 100_001) == 0
    assert reader._patience(10_100_001 + 100_000) == 50_000
    reader._skip = 2
    assert [reader._patience(10_200_001) for _ in range(3)] == [0, 0, 50_000]


def test_vain_looks_make_the_next_ones_rarer(rig: tuple[PythonReader, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After three: 8 faults without a look, then 16, at most 64; a look that finds something is not vain."""
    reader, writing = rig

    def patience(now: int) -> int:
        reader._last_ns = now - 1
        return 1000

    monkeypatch.setattr(reader, "_patience", patience)
    skipped = []
    for _ in range(8):
        os.write(writing, bytes(abi.MESSAGE_SIZE))
        outcome, found = reader.run(TURN, came=False, once=False)
        assert (outcome, found.length) == (Outcome.MESSAGES, abi.MESSAGE_SIZE)
        assert reader.run(TURN, came=True, once=False) == (Outcome.IDLE, None)
        skipped.append(reader._skip)
    assert skipped == [0, 0, 8, 16, 32, 64, 64, 64]


def test_who_is_ready_all_the_time_keeps_nobody_waiting() -> None:
    """Descriptors come in turn, though epoll names the same ones first."""
    pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(3)]
    with select.epoll() as epoll:
        reader = PythonReader(epoll, {})
        reader.land(memoryview(bytearray(abi.MESSAGE_SIZE)), memoryview(bytearray(8)).cast("q"))
        for number, (reading, writing) in enumerate(pipes):
            epoll.register(reading, select.EPOLLIN)
            reader.admit(reading, number, Counters())
            os.write(writing, bytes(9 * abi.MESSAGE_SIZE))
        found = [reader.run(TURN, came=False, once=False)[1].fd for _ in range(9)]
    assert len(set(found[:3])) == 3
    assert found == found[:3] * 3
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_the_loop_gets_its_turn(rig: tuple[PythonReader, int]) -> None:
    """However long the reader would look."""
    reader, _ = rig
    reader.spin_ns = TURN
    assert reader.run(0, came=True, once=False)[0] in (Outcome.IDLE, Outcome.DUE)
    reader._last_ns = 1 << 62
    assert reader.run(0, came=True, once=False)[0] == Outcome.DUE


class Told:
    """Stands for the native part: what it was told."""

    def __init__(self, epoll: int, words: list[int]) -> None:
        self.epoll = epoll
        self.words = words
        self.options: dict[str, int] = {}
        self.lines: list[tuple[int, dict[str, int]]] = []
        self.watched: list[tuple[int, list[int]]] = []
        self.closed = False

    def configure(self, **options: int) -> None:
        """Note them."""
        self.options.update(options)

    def describe(self, fd: int, **line: int) -> None:
        """Note it."""
        self.lines.append((fd, line))

    def watch(self, fd: int, pairs: list[int]) -> None:
        """Note it."""
        self.watched.append((fd, pairs))

    def run(self) -> None:
        """Not called."""

    def close(self) -> None:
        """Note it."""
        self.closed = True


class Scripted:
    """A reader in Python of two descriptors, whose clock goes on by 10 ns each time that it is read."""

    def __init__(self, patch: pytest.MonkeyPatch, answers: list[int | OSError]) -> None:
        self.answers = answers
        self.looks = 0
        self.polls: list[tuple[object, ...]] = []
        self.served: list[tuple[int, int, int]] = []
        self.plain = True
        self.reader = PythonReader(cast("Any", self), {})
        self.identity = memoryview(bytearray(8)).cast("q")
        self.reader.land(memoryview(bytearray(MESSAGES * abi.MESSAGE_SIZE)), self.identity)
        self.reader.admit(5, 50, Counters())
        self.reader.admit(6, 60, Counters())
        self.reader._last_ns = 990
        self.ready = [(5, select.EPOLLIN)]
        clock = count(1000, 10)
        patch.setattr(reading, "perf_counter_ns", lambda: next(clock))
        patch.setattr(reading, "_preadv", self.preadv)
        patch.setattr(self.reader, "serve", self.serve)

    def poll(self, *arguments: object) -> list[tuple[int, int]]:
        """Stand in for epoll."""
        self.polls.append(arguments)
        return self.ready

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        """Give the next answer; nothing, when there is none."""
        assert (buffers, offset, flags) == (self.reader._buffers, -1, os.RWF_NOWAIT)
        self.looks += 1
        answer = self.answers.pop(0) if self.answers else BlockingIOError()
        if isinstance(answer, OSError):
            raise answer
        return answer

    def serve(self, fd: int, slot: tuple[int, ...], message: memoryview) -> bool:
        """Note it."""
        assert message is self.reader._buffers[0]
        self.served.append((fd, slot[0], self.identity[0]))
        return self.plain


ONE = abi.MESSAGE_SIZE


@pytest.mark.parametrize(
    ("spin", "answers", "came", "looks", "vain"),
    [
        (0, [], False, 1, 0),  # nothing was served: no look in vain
        (0, [], True, 1, 0),  # no look was meant
        (100, [], True, 10, 1),
        (100, [ONE], False, 11, 1),
        (100, [ONE], True, 11, 1),
        (100, [BlockingIOError(), ONE, ONE], True, 13, 1),
    ],
)
def test_how_often_is_looked(
    monkeypatch: pytest.MonkeyPatch, spin: int, answers: list[int | OSError], came: bool, looks: int, vain: int
) -> None:
    """For `spin_ns` after each fault, to the nanosecond."""
    scripted = Scripted(monkeypatch, list(answers))
    scripted.reader.spin_ns = spin
    assert scripted.reader.run(TURN, came=came, once=False) == (Outcome.IDLE, None)
    assert (scripted.looks, scripted.reader._vain) == (looks, vain)
    assert scripted.served == [(5, 50, 50)] * answers.count(ONE)
    assert set(scripted.polls) == {(0, 32)}


def test_a_look_that_finds_something_is_not_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was in vain before it; the first look after sleep says nothing of that."""
    for came, vain in ((True, 1), (False, 3)):
        scripted = Scripted(monkeypatch, [ONE])
        scripted.reader.spin_ns = 100
        scripted.reader._vain = 2
        scripted.reader.run(TURN, came=came, once=False)
        assert scripted.reader._vain == vain


def test_the_turn_ends_when_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many faults there are; looking once ends with the first look that finds nothing."""
    scripted = Scripted(monkeypatch, [ONE] * 100)
    assert scripted.reader.run(30, came=False, once=False) == (Outcome.DUE, None)
    assert scripted.looks == 3
    scripted = Scripted(monkeypatch, [ONE] * 5)
    scripted.reader.spin_ns = 1000
    assert scripted.reader.run(TURN, came=True, once=True) == (Outcome.IDLE, None)
    assert scripted.looks == 6


def test_what_is_not_plain_is_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages, one or more, an error of the read, and what epoll says; what was dropped just now is nobody's."""
    error, broken = select.EPOLLERR, OSError(errno.EIO, "broken")
    for ready, answers, plain, expected in (
        ([(5, 1)], [ONE], False, (Outcome.MESSAGES, reading._Found(5, ONE, 0, 1))),
        ([(5, 1), (6, 9)], [ONE, 2 * ONE], True, (Outcome.MESSAGES, reading._Found(6, 2 * ONE, 0, 9))),
        ([(5, 1), (6, error)], [BlockingIOError()], True, (Outcome.MESSAGES, reading._Found(6, 0, 0, error))),
        ([(5, 1), (6, 9)], [BlockingIOError(), broken], True, (Outcome.FAILED, reading._Found(6, 0, errno.EIO, 9))),
        ([(5, 1), (6, 1)], [], True, (Outcome.IDLE, None)),
    ):
        scripted = Scripted(monkeypatch, cast("list[int | OSError]", list(answers)))
        scripted.ready, scripted.plain = ready, plain
        assert scripted.reader.run(TURN, came=False, once=True) == expected
    scripted = Scripted(monkeypatch, [2 * ONE])
    scripted.ready = [(5, 1), (6, 1)]
    scripted.reader.dismiss(5)
    assert scripted.reader.run(TURN, came=False, once=True) == (Outcome.MESSAGES, reading._Found(6, 2 * ONE, 0, 1))
    assert (scripted.looks, scripted.identity[0]) == (1, 60)


def test_a_single_descriptor_is_read_without_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its number is."""
    scripted = Scripted(monkeypatch, [2 * ONE])
    scripted.reader.only(6)
    assert scripted.reader.run(TURN, came=False, once=True) == (Outcome.MESSAGES, reading._Found(6, 2 * ONE, 0, 0))
    assert not scripted.polls
    scripted.reader.admit(0, 1, Counters())
    scripted.reader.only(0)
    scripted.answers.append(2 * ONE)
    assert scripted.reader.run(TURN, came=False, once=True)[1].fd == 0
    scripted.reader.only(-1)
    scripted.reader.run(TURN, came=False, once=True)
    assert scripted.polls


def test_the_native_part_reads_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Python does."""
    monkeypatch.setattr("aiouffd.native.reader.NativeReader", Told)
    spaces = cast("Any", {5: None})
    with select.epoll() as epoll:
        monkeypatch.setattr("aiouffd.native.reason", lambda: "")
        native: Any = reading.make_reader(epoll, spaces)
        assert native._reader.epoll == epoll.fileno()
        assert native._reader.words[0] == Counter.FAULTS
        monkeypatch.setattr("aiouffd.native.reason", lambda: "no compiler")
        python: Any = reading.make_reader(epoll, spaces)
        assert isinstance(python, PythonReader)
        assert (python._epoll, python._spaces) == (epoll, spaces)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[NativeReader, Told]]:
    """Return a native reader, and what stands for the native part of it."""
    monkeypatch.setattr("aiouffd.native.reader.NativeReader", Told)
    with select.epoll() as epoll:
        reader = NativeReader(epoll)
        made: Any = reader._reader
        assert made.epoll == epoll.fileno()
        yield reader, made


def plain(size: int, memory: tuple[int, int, int, int] | None, *, readahead: bool = False) -> PlainSource:
    """Return a source for the reader."""
    return (lambda _offset, _length: None), size, PAGE, 2, readahead, None, memory


@pytest.mark.parametrize(
    ("pages", "offset", "size", "length", "served"),
    [
        (8, 0, 64 * PAGE, 64 * PAGE, 8),  # all of the mapping
        (8, 4 * PAGE, 10 * PAGE + 1, 64 * PAGE, 6),  # its last, partial page is the engine's
        (8, 4 * PAGE, 64 * PAGE, 9 * PAGE - 1, 4),  # what lies there of it
        (8, 20 * PAGE, 10 * PAGE, 10 * PAGE, 0),  # behind its end
    ],
)
@pytest.mark.parametrize("file", [-2, -1, 0, 9])
def test_the_native_part_is_told_where_the_bytes_are(
    told: tuple[NativeReader, Told], pages: int, offset: int, size: int, length: int, served: int, file: int
) -> None:
    """Of the source's whole pages, until the mapping is closed; then its messages are the engine's again."""
    reader, native = told
    counters = Counters()
    reader.admit(5, 77, counters)
    reader.open(5, START, START + pages * PAGE, offset, plain(size, (ADDRESS, length, file, 123)))
    reader.close(5)
    reader.close(5)
    reader.dismiss(5)
    reader.dismiss(5)
    assert native.lines == [
        (5, {"identity": 77}),
        (
            5,
            {
                "near": 0,
                "identity": 77,
                "start": START,
                "end": START + served * PAGE,
                "source": ADDRESS + offset if file < 0 else offset,
                "page": PAGE,
                "mode": 2,
                "shown": {-2: Shown.MAPPED, -1: Shown.MEMORY}.get(file, Shown.FILE_PAGES),
                "file": file,
                "mapped": {-2: offset, -1: 0}.get(file, ADDRESS + offset),
                "mtime_ns": 123 if file >= 0 else 0,
                "room": 0,
                "used": 123 if file == -2 else 0,
                "words": address_of(counters.words),
            },
        ),
        (5, {"identity": 77}),
        (5, {"identity": -1}),
    ]


def test_what_the_native_part_cannot_serve_is_not_told(told: tuple[NativeReader, Told]) -> None:
    """A source that lies nowhere, readahead that has learned nothing yet, and a descriptor that is not read."""
    reader, native = told
    memory = (ADDRESS, 8 * PAGE, -1, 0)
    reader.admit(5, 77, Counters())
    reader.open(5, START, START + 8 * PAGE, 0, plain(8 * PAGE, None))
    reader.close(5)
    reader.open(5, START, START + 8 * PAGE, 0, plain(8 * PAGE, memory, readahead=True))
    reader.close(5)
    reader.open(6, START, START + 8 * PAGE, 0, plain(8 * PAGE, memory))
    reader.close(6)
    reader.dismiss(6)
    assert native.lines == [(5, {"identity": 77})]


def test_strangers_are_served_while_readahead_is_of_no_use(told: tuple[NativeReader, Told]) -> None:
    """Far from where its streams are expected; as soon as it is of use, each fault is the engine's again."""
    reader, native = told
    readahead = SimpleNamespace(
        limit=64 * PAGE, is_at_random=False, around=4 * PAGE, expected=lambda: [(8 * PAGE, 16 * PAGE)]
    )
    space: Any = SimpleNamespace(uffd=SimpleNamespace(fileno=lambda: 5), readahead=readahead)
    reader.refresh(space)
    reader.admit(5, 77, Counters())
    reader.refresh(space)
    reader.open(5, START, START + 32 * PAGE, 4 * PAGE, plain(64 * PAGE, (ADDRESS, 64 * PAGE, -1, 0), readahead=True))
    reader.refresh(space)
    assert len(native.lines) == 1
    readahead.is_at_random = True
    reader.refresh(space)
    reader.refresh(space)
    assert [line.get("near") for _, line in native.lines] == [None, 4 * PAGE]
    assert native.watched == [(5, [START + 4 * PAGE, START + 12 * PAGE])]
    readahead.limit = 0
    readahead.is_at_random = False
    reader.refresh(space)
    assert len(native.lines) == 2
    readahead.limit = 64 * PAGE
    reader.refresh(space)
    assert native.lines[2:] == [(5, {"identity": 77})]
    assert len(native.watched) == 1
    readahead.is_at_random, readahead.expected = True, list
    reader.refresh(space)  # it is told anew, and knows of no stream then
    assert len(native.watched) == 1
    readahead.expected = lambda: [(4 * PAGE, 5 * PAGE)]
    reader.refresh(space)
    assert native.watched[1:] == [(5, [START, START + PAGE])]


def test_the_native_part_is_told_where_messages_land(told: tuple[NativeReader, Told]) -> None:
    """Where it counts, how long it looks, and how it reads; what it writes to is kept alive."""
    reader, native = told
    assert native.options == {"flags": os.RWF_NOWAIT, "limit": 4 * abi.MESSAGE_SIZE}
    assert native.words == [Counter[name] for name in WORDS]
    assert reader.spin_ns == 0
    reader.spin_ns = 50_000
    assert reader.spin_ns == 50_000
    landing, identity = memoryview(bytearray(MESSAGES * abi.MESSAGE_SIZE)), memoryview(bytearray(8)).cast("q")
    reader.land(landing, identity)
    reader.only(5)
    reader.read_without_flags()
    assert native.options == {
        "flags": 0,
        "limit": MESSAGES * abi.MESSAGE_SIZE,
        "spin_ns": 50_000,
        "landing": address_of(landing),
        "identity": address_of(identity),
        "only": 5,
    }
    assert reader._landing == (landing, identity)
    run: Any = reader.run
    assert run == native.run
    reader.only(-1)
    assert (native.options["only"], native.options["limit"]) == (-1, 4 * abi.MESSAGE_SIZE)
    reader.end()
    assert native.closed
