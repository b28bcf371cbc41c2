"""`monitor.lookout`: looks at counters, and lets go of what is left."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
from scenario import eventually

import aiouffd
from aiouffd.monitor import lookout
from aiouffd.monitor.lookout import Lookout


class Seen:
    """A registration and an engine in one, with the counters that a test sets."""

    def __init__(self) -> None:
        self.found = 0
        self.told: list[int] = []
        self.lost = False

    def statistics(self) -> Any:
        """Return the counters."""
        if self.lost:
            raise aiouffd.ClosedError("gone")
        return SimpleNamespace(minor_faults=self.found, continues=0)

    def warn_of_unserved(self, found: int) -> None:
        """Take note."""
        self.told.append(found)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "_INTERVAL", 0.001)


def test_each_rise_is_looked_into_once() -> None:
    """Also one that comes just before the end; an engine that is gone ends nothing."""
    seen: Any = Seen()
    looking = Lookout(seen, seen.statistics)
    seen.found = 1
    eventually(lambda: seen.told, [1])
    seen.lost = True
    seen.found = 5
    seen.lost = False
    eventually(lambda: seen.told, [1, 5])
    looking.close()
    assert not looking._thread.is_alive()
    seen.found = 6
    looking.close()
    assert seen.told == [1, 5, 6]


def test_a_monitor_that_nobody_refers_to_is_let_go() -> None:
    """The thread ends with it."""
    seen: Any = Seen()
    looking = Lookout(seen, seen.statistics)
    del seen
    gc.collect()
    looking._thread.join(60)
    assert not looking._thread.is_alive()


def test_only_in_the_end() -> None:
    """Where to count is to ask another process."""
    seen: Any = Seen()
    looking = Lookout(seen, seen.statistics, meanwhile=False)
    seen.found = 1
    assert looking._thread.ident is None
    looking.close()
    assert seen.told == [1]
