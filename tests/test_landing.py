"""`engine.landing`: which flights are told, and what is said of them."""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from engine_world import BASE
from pattern import PAGE

from aiouffd.engine import landing
from aiouffd.engine.flight import Flight
from aiouffd.engine.landing import Landings
from aiouffd.engine.runs import FOR_FAULT, Purpose
from aiouffd.engine.statistics import Counter
from aiouffd.errors import SourceError

if TYPE_CHECKING:
    import pytest

    from aiouffd.sources.steps import Steps

SECOND = 1_000_000_000


class Space:
    """Whose flights they are."""


def flight(seconds: float, *wanted: int, purpose: Purpose = FOR_FAULT) -> Flight:
    """Return one that began so many seconds ago."""
    found = Flight(BASE, BASE + 4 * PAGE, 8 * PAGE, perf_counter_ns() - round(seconds * SECOND), purpose)
    found.wanted.update(dict.fromkeys(wanted, found.began_ns))
    return found


def test_a_fault_that_took_long_is_told_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one space, once a second. What no thread has waited for is not told, nor what was quick."""
    told: list[tuple[Any, dict[str, Any]]] = []
    landings = Landings(lambda space, what: told.append((space, what["slow"])))
    one, other = Space(), Space()
    now = perf_counter_ns()
    queued: Steps = [("queue", now - 8 * SECOND, now, {}), ("read", now, now, {"error": "OSError"})]
    for clock, space, landed, steps in (
        (5.0, one, flight(0.001, BASE), []), (5.0, one, flight(9.0), []),
        (5.0, one, flight(9.0, BASE, BASE + PAGE), []),
        (5.9, one, flight(9.0, BASE), []), (5.9, other, flight(9.0, BASE), queued), (6.1, one, flight(9.0, BASE), []),
    ):  # fmt: skip
        monkeypatch.setattr(landing, "monotonic", lambda clock=clock: clock)
        landings(space, landed, steps, None)
    assert [(space, what["cause"], what["pages"], what["tries"]) for space, what in told] == [
        (one, "source", 2, 0), (other, "queue", 1, 1), (one, "source", 1, 0)
    ]  # fmt: skip
    assert (told[0][1]["offset"], told[0][1]["length"]) == (8 * PAGE, 4 * PAGE)
    assert told[0][1]["took_ns"] >= 9 * SECOND
    assert told[1][1]["queued_ns"] == 8 * SECOND


def test_a_thread_that_joins_a_long_flight_has_not_waited_for_all_of_it() -> None:
    """What was brought ahead for seconds, and touched just before it came, is no slow fault."""
    told: list[Any] = []
    ahead = flight(30.0)
    ahead.want(BASE)
    since = ahead.waited_ns
    ahead.want(BASE + PAGE, 1, 7)
    assert ahead.waited_ns == since  # of the first one that waits
    assert [fault[:3] for fault in ahead.faults] == [(BASE, 0, 0), (BASE + PAGE, 7, 1)]
    Landings(lambda _, what: told.append(what))(Space(), ahead, [], None)
    assert not told
    assert perf_counter_ns() - ahead.waited_ns < 20 * SECOND < perf_counter_ns() - ahead.began_ns


def test_all_are_told_where_somebody_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their steps and their failure; no more than so many a second, and how many were left out."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(landing, "monotonic", lambda: 5.0)
    monkeypatch.setattr(landing, "_TRACED", 4.0)
    landings = Landings(lambda _, what: told.append(what["flight"]), traces=True)
    steps: Steps = [("read", 1, 2, {})] * (landing._STEPS + 1)
    landings(Space(), flight(0.0, purpose=Purpose(Counter.PAGES_BACKGROUND)), steps, SourceError("it", 0, 1, "is lost"))
    for _ in range(5):
        landings(Space(), flight(0.0, BASE), [], None)
    monkeypatch.setattr(landing, "monotonic", lambda: 6.0)
    landings(Space(), flight(0.0), [], None)
    assert [(what["for"], what["error"], what["omitted"]) for what in told] == [
        ("background", "SourceError", 0), *[("fault", "", 0)] * 3, ("readahead", "", 2)
    ]  # fmt: skip
    dropped: list[dict[str, Any]] = []

    def full(_: object, what: dict[str, Any]) -> bool:
        dropped.append(what["flight"])
        return False

    landings = Landings(full, traces=True)
    for _ in range(3):
        landings(Space(), flight(0.0), [], None)
    assert [what["omitted"] for what in dropped] == [0, 1, 2]  # what there was no room for is counted, too
    assert "is lost" in told[0]["reason"]
    assert len(told[0]["steps"]) == landing._STEPS
    assert told[1]["began_ns"] == told[1]["waited_ns"] <= told[1]["ended_ns"]
