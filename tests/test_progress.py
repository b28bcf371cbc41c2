"""`monitor.progress`: how much has come, how fast, and how that is shown."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import pytest

from aiouffd.monitor import progress as module
from aiouffd.monitor.progress import Meter, Progress, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 1 << 30


def test_a_rate_is_that_of_the_last_seconds() -> None:
    """At the first look it is not known; where nothing comes, or comes and goes, the rest has no time."""
    now = 100.0
    meter = Meter(1000, lambda: now)
    assert meter.look(100) == Progress(1000, 100, 0.0, None)
    now += 1
    assert meter.look(200) == Progress(1000, 200, 100.0, 8.0)
    now += 1
    assert meter.look(200) == Progress(1000, 200, 50.0, 16.0)
    now += 8.5  # the first look is forgotten
    assert meter.look(390) == Progress(1000, 390, 20.0, 30.5)
    now += 20
    assert meter.look(390) == Progress(1000, 390, 0.0, None)
    now += 1
    assert meter.look(380) == Progress(1000, 380, 0.0, None)
    assert meter.look(1000).remaining == 0.0


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress(4 * GIB, GIB, 128 << 20, 24.4), "1.0 GiB of 4.0 GiB (25 %), 128.0 MiB/s, 24 s left"),
        (Progress(1000, 0, 0.0, None), "0 bytes of 1000 bytes (0 %), 0 bytes/s"),
        (Progress(0, 0, 0.0, 0.0), "0 bytes of 0 bytes (100 %)"),
        (Progress(GIB, GIB, 128 << 20, 0.0), "1.0 GiB of 1.0 GiB (100 %), 128.0 MiB/s"),
        (Progress(3 << 50, 1536, 0.0, None), "1.5 KiB of 3072.0 TiB (0 %), 0 bytes/s"),
    ],
)
def test_a_line(progress: Progress, text: str) -> None:
    """In units that people read."""
    assert str(progress) == text


class Terminal(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The seconds that the module sees."""
    seconds = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: seconds[0])
    yield seconds  # noqa: PT022 - the patch ends behind it


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    """One in five seconds, and one in the end; none where there is no standard error."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with shown(True, "[0, 100)") as show:
        for seconds, resident in ((1, 10), (6, 60), (7, 70), (8, 100)):
            clock[0] = seconds
            show(Progress(100, resident, 10.0, 4.0))
        monkeypatch.setattr(sys, "stderr", None)
        show(Progress(100, 100, 10.0, 0.0))
    lines = [f"aiouffd: [0, 100): {part} bytes of 100 bytes ({part} %), 10 bytes/s, 4 s left" for part in (60, 100)]
    assert log.getvalue().splitlines() == lines


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rich; without it there are lines."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with shown(True, "weights") as show:
        show(Progress(2 << 20, 1 << 20, 1e6, 1.0))
        show(Progress(2 << 20, 2 << 20, 1e6, 0.0))
    assert "weights" in terminal.getvalue()
    assert "2.0/2.0 MiB" in terminal.getvalue()
    plain = Terminal()
    monkeypatch.setattr(sys, "stderr", plain)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with shown(True, "weights") as show:
        show(Progress(1, 1, 1.0, 0.0))
    assert plain.getvalue() == "aiouffd: weights: 1 byte of 1 byte (100 %), 1 byte/s\n"


def test_a_function_is_told() -> None:
    """And nothing is written."""
    told: list[Progress] = []
    with shown(told.append, "weights") as show:
        show(Progress(1, 1, 1.0, 0.0))
    assert told == [Progress(1, 1, 1.0, 0.0)]
