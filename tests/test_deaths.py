"""`deaths`: what is given up, and when."""

from __future__ import annotations

import signal

from aiouffd.pager.process.deaths import KILLED, Deaths


def test_crashes_are_counted() -> None:
    """By whatever signal but SIGKILL, or by exit status; each that follows progress is the first."""
    deaths = Deaths(lambda: 0.0)
    codes = (1, -signal.SIGSEGV, -signal.SIGABRT, 1, 1)
    assert [deaths.add(code, 7) for code in codes] == [False] * 4 + [True]
    assert not deaths.add(1, 8)
    assert [deaths.add(1, 8, calm=calm) for calm in (False, False, True, False, False, False)] == [False] * 6
    assert deaths.add(1, 8)


def test_kills_are_not_to_blame_until_they_go_on() -> None:
    """Ten seconds without a resolved fault end it all the same."""
    now = 100.0
    deaths = Deaths(lambda: now)
    for number in range(50):
        assert not deaths.add(-signal.SIGKILL, 7)
        assert bool(deaths.pause) == (number >= 4)
    now += KILLED - 1
    assert not deaths.add(-signal.SIGKILL, 7)
    now += 1
    assert deaths.add(-signal.SIGKILL, 7)
    assert deaths.count == 52
    assert not deaths.add(-signal.SIGKILL, 8)
    now += 2 * KILLED
    assert [deaths.add(-signal.SIGKILL, 8) for _ in range(4)] == [False] * 3 + [True]


def test_kills_between_crashes_do_not_count_for_them() -> None:
    """Five crashes are needed."""
    deaths = Deaths(lambda: 0.0)
    assert not any(deaths.add(code, 7) for code in [-signal.SIGKILL, 1] * 4)
    assert deaths.add(1, 7)
