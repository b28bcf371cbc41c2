"""`kernel.unserved`: mappings that turn missing pages into zeros for everybody."""

from __future__ import annotations

import logging
import mmap
from typing import Any

import pytest
from pattern import PAGE, Pattern, content
from scenario import eventually, play

import aiouffd
from aiouffd import RegisterMode, Userfaultfd
from aiouffd.kernel import unserved
from aiouffd.kernel.memory import address_of
from aiouffd.kernel.unserved import unserved_mappings
from aiouffd.monitor import lookout


def test_only_mappings_that_nobody_watches_are_found() -> None:
    """Of the same memfd, in this process: neither the registered one nor those of other files."""
    region = aiouffd.Region(16 * PAGE, shared=True)
    elsewhere = aiouffd.Region(16 * PAGE, shared=True)
    assert unserved_mappings(region.fd) == []
    with Userfaultfd() as uffd:
        uffd.register(region.address, 16 * PAGE, RegisterMode.MISSING)
        other = mmap.mmap(region.fd, 8 * PAGE)
        assert unserved_mappings(region.fd) == [aiouffd.Range(address_of(other), 8 * PAGE)]
        uffd.register(address_of(other), 8 * PAGE, RegisterMode.MISSING)
        assert unserved_mappings(region.fd) == []
    assert unserved_mappings(elsewhere.fd) == []


def test_smaps_is_not_read_for_one_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes time in a process with much memory."""
    monkeypatch.setattr(unserved, "smaps", lambda: pytest.fail("read"))
    assert unserved_mappings(aiouffd.Region(PAGE, shared=True).fd) == []


def touched_elsewhere(touch: bool, monitors: int, engine: str) -> None:
    """Scenario."""
    region = aiouffd.Region(64 * PAGE, shared=True)
    chosen = aiouffd.InThread() if engine == "in_thread" else aiouffd.Pager()
    with aiouffd.Monitor(region, Pattern(64 * PAGE), engine=chosen, readahead=0):
        if monitors == 2:
            other = aiouffd.Region.from_fd(region.fd)
            with aiouffd.Monitor(other, Pattern(64 * PAGE), readahead=0):
                assert other[2 * PAGE : 3 * PAGE] == content(2 * PAGE, PAGE)
                assert region[2 * PAGE : 3 * PAGE] == content(2 * PAGE, PAGE)
        else:
            plain = mmap.mmap(region.fd, 64 * PAGE)
            if touch:
                assert plain[2 * PAGE] == 0
                assert region[2 * PAGE] == 0  # what userfaultfd cannot prevent
            else:
                assert region[2 * PAGE] == plain[2 * PAGE] == 3


@pytest.mark.parametrize("engine", ["pager", "in_thread"])
def test_a_touch_through_another_mapping_is_reported(engine: str) -> None:
    """Where the mapping is, what its touches do, and what to do about it."""
    _, errors = play(touched_elsewhere, True, 1, engine)
    assert "without a Monitor. A missing page that was touched there is a page of zeros" in errors
    assert "touched here: 1. " in errors
    assert "Region.from_fd" in errors


def touched_twice(engine: str) -> None:
    """Scenario: a mapping is found while the region is served; it is gone when the Monitor is left."""
    lookout._INTERVAL = 0.01  # type: ignore[misc]
    region = aiouffd.Region(64 * PAGE, shared=True)
    chosen: Any = {"in_thread": aiouffd.InThread, "pager": aiouffd.Pager}[engine]()
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("aiouffd").addHandler(handler)
    with aiouffd.Monitor(region, Pattern(64 * PAGE), engine=chosen, readahead=0):
        with mmap.mmap(region.fd, 64 * PAGE) as plain:
            assert plain[2 * PAGE] == region[2 * PAGE] == 0
            eventually(lambda: len(told), 1)
            assert plain[3 * PAGE] == region[3 * PAGE] == 0
        assert region[4 * PAGE] == 5
    assert ["without a Monitor" in text for text in told] == [True]


@pytest.mark.parametrize("engine", ["pager", "in_thread"])
def test_it_is_reported_while_the_region_is_served(engine: str) -> None:
    """Once for each mapping."""
    play(touched_twice, engine)


@pytest.mark.parametrize(("touch", "monitors"), [(False, 1), (True, 2)])
def test_harmless_mappings_are_not_reported(touch: bool, monitors: int) -> None:
    """One that touches only what is present, and one with a Monitor of its own."""
    _, errors = play(touched_elsewhere, touch, monitors, "pager")
    assert "without a Monitor" not in errors
