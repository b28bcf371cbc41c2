"""`monitor.watching`: how far a background fill or a replay is."""

from __future__ import annotations

import threading
from array import array
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Pattern, Slow
from scenario import eventually, play

import aiouffd
from aiouffd.engine.ahead.trace import Trace
from aiouffd.monitor import watching
from aiouffd.monitor.held import Held
from aiouffd.monitor.progress import Progress
from aiouffd.monitor.watching import Watching
from aiouffd.ranges import RangeSet

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 16 * PAGE + 5


def is_over() -> None:
    """Wait until nobody looks any more."""
    eventually(lambda: [thread for thread in threading.enumerate() if thread.name == "aiouffd-progress"], [])


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often."""
    monkeypatch.setattr(watching, "_INTERVAL", 0.001)


def test_it_ends_when_all_has_come() -> None:
    """And says so; until then it looks again and again."""
    region = aiouffd.Region(SIZE)
    seen: list[Progress] = []
    watch = Watching(Held(region), seen.append, None, "x")
    assert (watch._total, watch._held()) == (SIZE, None)  # nobody keeps it: there is nothing to look at
    is_over()
    seen.clear()  # it may have looked before the constructor returned, which kept it
    kept = Held(region)
    Watching(kept, seen.append, None, "x")
    eventually(lambda: len(seen) > 3, expected=True)
    assert {now.resident for now in seen} == {0}
    region[:] = bytes(SIZE)
    is_over()
    assert (seen[-1].total, seen[-1].resident) == (SIZE, SIZE)


def test_a_recording_is_added_in_the_order_of_its_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any other, each page costs as much as there are pages, and whoever enters the Monitor waits for that."""
    added: list[int] = []

    class Noting(RangeSet):
        def add(self, start: int, end: int) -> None:
            added.append(start)
            super().add(start, end)

    monkeypatch.setattr(watching, "RangeSet", Noting)
    region = aiouffd.Region(SIZE)
    kept, trace = Held(region), Trace(PAGE, SIZE, array("Q", [16 * PAGE, 3 * PAGE, 9 * PAGE]))
    Watching(kept, lambda _: None, trace, "x").close()
    is_over()
    assert added == [3 * PAGE, 9 * PAGE, 16 * PAGE]


def test_of_a_recording_its_pages_count() -> None:
    """Each once, the last one cut; what else has come does not."""
    region = aiouffd.Region(SIZE)
    kept, seen = Held(region), list[Progress]()
    offsets = [16 * PAGE, 3 * PAGE, 2 * PAGE]
    trace = Trace(PAGE, SIZE, array("Q", offsets))
    Watching(kept, seen.append, trace, "x")
    region[5 * PAGE] = region[3 * PAGE] = 1
    eventually(lambda: seen[-1].resident if seen else 0, PAGE)
    region[2 * PAGE] = region[16 * PAGE] = 1
    is_over()
    assert (seen[-1].total, seen[-1].resident) == (2 * PAGE + 5, 2 * PAGE + 5)


@pytest.mark.parametrize("how", ["closed", "gone"])
def test_a_region_that_is_gone_or_closed_is_not_looked_at(how: str) -> None:
    """The thread ends."""
    region = aiouffd.Region(SIZE)
    kept, seen = Held(region), list[Progress]()
    Watching(kept, seen.append, None, "x")
    eventually(lambda: bool(seen), expected=True)
    if how == "closed":
        region.close()
    else:
        kept.release()
        del region
    is_over()


def background(path: str, how: str) -> None:
    """Scenario: a region is filled in the background, or replayed, or left before."""
    seen: list[Progress] = []
    source: Any = Slow(SIZE, 30.0) if how == "left" else Pattern(SIZE)
    if how == "replay":
        with aiouffd.open(source, engine=aiouffd.InThread(), readahead=0, record=path) as region:
            assert [region[at * PAGE] for at in (9, 2)] == [10, 3]
    options: Any = {"replay": path} if how == "replay" else {"background": True}
    region = aiouffd.map(source, engine=aiouffd.InThread(), progress=seen.append, **options)
    monitor = region.monitor
    if how == "left":
        region.close()
        assert [now.resident for now in seen[-1:]] == [0]
    else:
        total = 2 * PAGE if how == "replay" else SIZE
        eventually(lambda: seen[-1].resident if seen else 0, total)
        assert seen[-1].total == total
        del region
        eventually(lambda: monitor.serves_here, expected=False)
    is_over()


@pytest.mark.kernel
@pytest.mark.parametrize("how", ["background", "replay", "left"])
def test_a_monitor_is_watched(how: str, tmp_path: Path) -> None:
    """From entering on; it keeps no region, and ends with the Monitor."""
    assert play(background, str(tmp_path / "trace"), how) == ("", "")
