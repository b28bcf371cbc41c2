"""`engine.serve.reads`: bounded, timed and retried."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest
from engine_world import turns

from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.common import Common
from aiouffd.engine.serve.reads import Reads, _between
from aiouffd.engine.statistics import Counters
from aiouffd.errors import ShortReadError, SourceError, SourceTimeoutError
from aiouffd.sources import steps


class Scripted:
    """Answers as the script says: bytes, or an error to raise; None waits for ever."""

    size = 1 << 20

    def __init__(self, *script: Any, **attributes: Any) -> None:
        self.script = list(script)
        self.asked: list[tuple[int, int]] = []
        vars(self).update(attributes)

    async def read(self, offset: int, length: int) -> Any:
        """Answer."""
        self.asked.append((offset, length))
        answer = self.script.pop(0)
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def reading(source: Any, counters: Counters, limits: Limits) -> Reads:
    """Return the reads of a source that nobody else has."""
    return Reads(Common(source), counters, limits)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Return between what bounds each pause was chosen; none is slept."""
    chosen: list[tuple[float, float]] = []

    def between(low: float, high: float) -> float:
        chosen.append((low, high))
        return 0.0

    monkeypatch.setattr("aiouffd.engine.serve.reads._between", between)
    return chosen


def test_pauses_are_spread() -> None:
    """Within their bounds, which are pauses themselves."""
    chosen = {_between(1.0, 2.0) for _ in range(1000)}
    assert min(chosen) >= 1.0
    assert max(chosen) <= 2.0
    assert len(chosen) > 100


async def test_a_dead_file_system_is_named() -> None:
    """ENOTCONN of a file says what has ended."""
    source = Scripted(OSError(errno.ENOTCONN, "Transport endpoint is not connected"))
    with pytest.raises(SourceError, match="the daemon of its FUSE file system has ended"):
        await reading(source, Counters(), Limits(retries=0)).read(0, 1, urgent=True)


async def test_a_read_is_counted_while_it_is_under_way_and_when_it_is_done() -> None:
    """In flight, and its bytes."""
    source, counters = Scripted(b"1234"), Counters()
    reads = reading(source, counters, Limits())
    seen: list[tuple[int, int]] = []
    answer = source.read

    async def read(offset: int, length: int) -> Any:
        found = counters.snapshot()
        seen.append((found.in_flight, found.bytes_in_flight))
        await asyncio.sleep(0.002)
        return await answer(offset, length)

    source.read = read  # type: ignore[method-assign]
    assert await reads.read(8, 4, urgent=True) == b"1234"
    assert seen == [(1, 4)]
    found = counters.snapshot()
    assert (found.in_flight, found.bytes_in_flight, found.bytes_fetched, found.source_retries) == (0, 0, 4, 0)
    assert found.source_reads == 1
    assert found.source_ns > 1_000_000
    assert (reads._gate.reads, reads._gate.size) == (0, 0)
    assert source.asked == [(8, 4)]


async def test_what_nobody_waits_for_is_read_ahead() -> None:
    """A source that tells them apart is told, also when it is tried again."""
    told: list[str] = []

    class Both:
        size = 100

        async def read(self, offset: int, length: int) -> bytes:
            told.append("read")
            return bytes(length)

        async def read_ahead(self, offset: int, length: int) -> bytes:
            told.append("ahead")
            return bytes(length)

    reads = reading(Both(), Counters(), Limits())
    await reads.read(0, 4, urgent=True)
    await reads.read(0, 4, urgent=False)
    assert told == ["read", "ahead"]


@pytest.mark.usefixtures("pauses")
async def test_how_long_reads_ahead_take_is_told() -> None:
    """Of those that succeed; what a thread waits for may be much smaller, or come from elsewhere."""
    reads = reading(Scripted(b"a", OSError(errno.EIO, ""), b"b"), Counters(), Limits())
    await reads.read(0, 1, urgent=True)
    with pytest.raises(SourceError):
        await reads.read(0, 1, urgent=False, retries=0)
    assert reads._gate.share == 1  # nothing is known
    await reads.read(0, 1, urgent=False)
    assert reads._gate.share > 1


async def test_what_a_read_has_waited_for_is_told() -> None:
    """For its turn, and for tries that have failed."""
    reads = reading(Scripted(None, OSError("no"), b"1"), Counters(), Limits(concurrent_reads=1))
    first = asyncio.create_task(reads.read(0, 1, urgent=True))
    await turns()
    noted = steps.begin()
    second = asyncio.create_task(reads.read(0, 1, urgent=True))
    await turns()
    first.cancel()
    await second
    assert [(name, details.get("error")) for name, *_, details in noted] == [
        ("queue", None), ("read", "OSError"), ("retry", None), ("read", "")
    ]  # fmt: skip
    ends = [time for _, began, ended, _ in noted for time in (began, ended)]
    assert ends == sorted(ends)
    assert steps.spent(noted, "queue") > 0


async def test_tries_are_spread_and_become_rarer(pauses: list[tuple[float, float]]) -> None:
    """Each pause is twice the one before, and half of it is chance: no source is hammered."""
    counters = Counters()
    reads = reading(Scripted(*[OSError(errno.EIO, "no")] * 4, b"12"), counters, Limits(backoff=0.2))
    assert await reads.read(0, 2, urgent=True) == b"12"
    assert pauses == [(0.1, 0.2), (0.2, 0.4), (0.4, 0.8), (0.8, 1.6)]
    assert counters.snapshot().source_retries == 4


@pytest.mark.usefixtures("pauses")
async def test_the_usual_number_of_tries() -> None:
    """Five, where nobody says another."""
    source = Scripted(*[OSError(errno.EIO, "no")] * 9)
    with pytest.raises(SourceError):
        await reading(source, Counters(), Limits()).read(0, 1, urgent=True)
    assert len(source.asked) == 5


async def test_a_source_that_retries_by_itself_is_told_how() -> None:
    """And what it tries again is counted."""
    told: list[Any] = []
    counters = Counters()
    reading(Scripted(begin=lambda *terms: told.append(terms)), counters, Limits(timeout=7.0, retries=3))
    ((timeout, retries, count),) = told
    assert (timeout, retries) == (7.0, 3)
    count()
    assert counters.snapshot().source_retries == 1


@pytest.mark.parametrize("backoff", [0.25, 1.5, 3.0])
async def test_the_pause_is_slept(monkeypatch: pytest.MonkeyPatch, backoff: float) -> None:
    """And is as long as was chosen."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("aiouffd.engine.serve.reads.asyncio.sleep", sleep)
    reads = reading(Scripted(OSError("no"), b"1"), Counters(), Limits(backoff=backoff))
    await reads.read(0, 1, urgent=True)
    (seconds,) = slept
    assert min(backoff, 2.0) / 2 <= seconds <= min(backoff, 2.0)


@pytest.mark.parametrize(("own", "asked", "tries"), [(None, None, 3), (0, None, 1), (5, None, 6), (5, 1, 2)])
@pytest.mark.usefixtures("pauses")
async def test_how_often_it_is_tried(own: int | None, asked: int | None, tries: int) -> None:
    """As the limits say, as the source says, as the caller says: the last comes first. Then the error is raised."""
    attributes = {} if own is None else {"retries": own}
    source = Scripted(*[OSError(errno.EIO, "no")] * 9, **attributes)
    with pytest.raises(SourceError, match=r"OSError: .*no") as caught:
        await reading(source, Counters(), Limits(retries=2)).read(16, 4, urgent=True, retries=asked)
    assert len(source.asked) == tries
    assert (caught.value.offset, caught.value.length) == (16, 4)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.usefixtures("pauses")
async def test_an_error_that_is_for_good_is_not_retried() -> None:
    """The source itself says so, or gives too little; a timeout that it tells of is retried."""
    failure = SourceError("it", 0, 1, "gone")
    with pytest.raises(SourceError) as caught:
        await reading(Scripted(failure), Counters(), Limits()).read(0, 1, urgent=True)
    assert caught.value is failure
    with pytest.raises(ShortReadError, match="gave 3 bytes of 4; it says that it has 1048576"):
        await reading(Scripted(b"123"), Counters(), Limits()).read(0, 4, urgent=True)
    late = SourceTimeoutError("it", 0, 1, "late")
    assert await reading(Scripted(late, b"1"), Counters(), Limits()).read(0, 1, urgent=True) == b"1"
    with pytest.raises(SourceTimeoutError) as told:
        await reading(Scripted(late), Counters(), Limits(retries=0)).read(0, 1, urgent=True)
    assert told.value is late


@pytest.mark.parametrize("own", [False, True])
async def test_a_read_has_its_time(own: bool) -> None:
    """As the limits say, or the source; then it is an error that says how long."""
    source = Scripted(None, **({"timeout": 0.01} if own else {}))
    reads = reading(source, Counters(), Limits(timeout=60.0 if own else 0.01, retries=0))
    with pytest.raises(SourceTimeoutError, match=r"no answer in 0\.01 s") as caught:
        await reads.read(0, 1, urgent=True)
    assert isinstance(caught.value.__cause__, TimeoutError)
    await reads.aclose()
    assert reads._deadlines._timer is None


@pytest.mark.usefixtures("pauses")
async def test_a_read_that_is_no_coroutine_function_is_named() -> None:
    """At once: further tries would answer the same."""

    class Plain:
        size = 8

        def read(self, _offset: int, length: int) -> bytes:
            return bytes(length)

    counters = Counters()
    with pytest.raises(SourceError, match="`read` returned bytes, no awaitable: it must be `async def read"):
        await reading(Plain(), counters, Limits()).read(0, 4, urgent=True)
    assert counters.snapshot().source_retries == 0


async def test_bytes_that_do_not_lie_in_one_piece_are_refused() -> None:
    """Their address is what is copied from."""
    with pytest.raises(SourceError, match="one piece"):
        await reading(Scripted(*[memoryview(bytes(8))[::2]] * 5), Counters(), Limits()).read(0, 4, urgent=True)


@pytest.mark.parametrize("odd", [SystemExit(3), asyncio.CancelledError()])
@pytest.mark.usefixtures("pauses")
async def test_whatever_a_source_raises_fails_the_read_only(odd: BaseException) -> None:
    """Also the cancelation of something that it has waited for."""
    with pytest.raises(SourceError, match=type(odd).__name__):
        await reading(Scripted(odd), Counters(), Limits(retries=0)).read(0, 1, urgent=True)


async def test_canceling_gives_the_place_up() -> None:
    """While it waits for its turn, and while it reads."""
    counters = Counters()
    reads = reading(Scripted(None, b"1"), counters, Limits(concurrent_reads=1))
    first = asyncio.create_task(reads.read(0, 1, urgent=True))
    await turns()
    second = asyncio.create_task(reads.read(0, 1, urgent=True))
    third = asyncio.create_task(reads.read(0, 1, urgent=False))
    await turns()
    assert counters.snapshot().in_flight == 1
    for task in (second, first):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await third == b"1"
    assert counters.snapshot().in_flight == 0
    assert (reads._gate.reads, reads._gate.size) == (0, 0)


async def test_a_pause_between_two_tries_keeps_nobody_waiting() -> None:
    """A source that fails for some pages does not hold up those that it has."""
    counters = Counters()
    reads = reading(Scripted(OSError("once"), b"2", b"1"), counters, Limits(concurrent_reads=1, backoff=1.0))
    first = asyncio.create_task(reads.read(0, 1, urgent=True))
    await turns()
    assert counters.snapshot().in_flight == 0
    assert await reads.read(1, 1, urgent=False) == b"2"
    assert not first.done()
    assert await first == b"1"


async def test_urgent_reads_go_first() -> None:
    """A thread waits for them."""
    source = Scripted(None, b"1", b"2")
    reads = reading(source, Counters(), Limits(concurrent_reads=1))
    blocking = asyncio.create_task(reads.read(0, 1, urgent=True))
    await turns()
    ahead = [asyncio.create_task(reads.read(place, 1, urgent=False)) for place in (10, 11)]
    await turns()
    urgent = asyncio.create_task(reads.read(20, 1, urgent=True))
    await turns()
    source.script.append(b"3")
    reads._gate._turn = 1  # it is no patient one's turn
    blocking.cancel()
    await asyncio.gather(*ahead, urgent)
    assert [offset for offset, _ in source.asked] == [0, 20, 10, 11]


@pytest.mark.usefixtures("pauses")
async def test_errors_say_whose_bytes_they_are() -> None:
    """Of which source, from where on, how many, and why."""
    late = Scripted(None, timeout=0.01)
    odd = Scripted(ValueError("odd"))
    short = Scripted(b"123")
    split = Scripted(memoryview(bytes(8))[::2])
    reasons = []
    for source in (late, odd, short, split):
        with pytest.raises(SourceError) as caught:
            await reading(source, Counters(), Limits(retries=0)).read(16, 4, urgent=True)
        assert (caught.value.source, caught.value.offset, caught.value.length) == (repr(source), 16, 4)
        reasons.append((type(caught.value), caught.value.reason))
    assert reasons == [
        (SourceTimeoutError, "no answer in 0.01 s"),
        (SourceError, "ValueError: odd"),
        (ShortReadError, "gave 3 bytes of 4; it says that it has 1048576"),
        (SourceError, "TypeError: what it gave does not lie in one piece"),
    ]


async def test_each_read_is_counted() -> None:
    """Also one that gave too little."""
    counters = Counters()
    reads = reading(Scripted(b"1234", b"12", b"123"), counters, Limits(retries=0))
    await reads.read(0, 4, urgent=True)
    await reads.read(0, 2, urgent=True)
    with pytest.raises(ShortReadError):
        await reads.read(0, 4, urgent=True)
    assert counters.snapshot().bytes_fetched == 9
