"""`waiting.Waiter`: a thread waits for a descriptor, for a time, or until it is woken or stopped."""

from __future__ import annotations

import math
import os
import select
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from aiouffd.errors import PagerError
from aiouffd.pager.client.waiting import Later, StoppedError, Waiter, Watches

if TYPE_CHECKING:
    from collections.abc import Iterator


class Watch:
    """Counts how often it was told that Python runs."""

    beat = 0.01
    alives = 0
    closed = False

    def alive(self) -> None:
        """Be told."""
        self.alives += 1

    def close(self) -> None:
        """Be done."""
        self.closed = True


@pytest.fixture
def waiter() -> Iterator[Waiter]:
    """One with a watch that counts."""
    watch: Any = Watch()
    waiter = Waiter(watch)
    yield waiter
    waiter.close()
    assert watch.closed


def test_a_descriptor_that_becomes_readable(waiter: Waiter) -> None:
    """That is the answer; what is not readable is False when the time is up."""
    read, write = os.pipe()
    assert not waiter.wait(0.0, read)
    assert not waiter.wait(0.02, read)
    os.write(write, b"x")
    assert waiter.wait(60.0, read)
    os.close(read)
    os.close(write)


def test_the_watch_is_told_while_it_waits(waiter: Waiter) -> None:
    """At each beat: Python runs, though nobody serves."""
    waiter.wait(0.05)
    assert isinstance(waiter.watch, Watch)
    assert waiter.watch.alives >= 2


def readable(waiter: Waiter) -> bool:
    """Tell whether somebody has called `wake`."""
    return bool(select.select([waiter], [], [], 0)[0])


def test_waking_is_remembered_until_it_is_drained(waiter: Waiter) -> None:
    """More calls than a socket takes do not block either."""
    for _ in range(2000):
        waiter.wake()
    assert readable(waiter)
    waiter.drain()
    assert not readable(waiter)
    waiter.wake()
    assert readable(waiter)
    waiter.drain()
    waiter.drain()
    assert not readable(waiter)


def test_a_waiter_whose_descriptors_were_closed(waiter: Waiter) -> None:
    """It says so; the file that has the number then is neither written to, read, nor closed."""
    number = waiter.fileno()
    waiter.check()
    reading, writing = os.pipe()
    os.write(writing, b"theirs")
    os.dup2(reading, number)
    waiter.wake()
    waiter.drain()
    for wait in (waiter.check, partial(waiter.wait, 1000.0)):
        with pytest.raises(PagerError, match="has closed descriptors"):
            wait()
    waiter.close()
    assert os.read(number, 10) == b"theirs"
    for fd in (number, reading, writing):
        os.close(fd)


def test_stopping_ends_each_wait(waiter: Waiter) -> None:
    """The one that is under way, and those that come."""
    thread = threading.Timer(0.02, waiter.stop)
    thread.start()
    with pytest.raises(StoppedError):
        waiter.wait(1000.0)
    thread.join()
    with pytest.raises(StoppedError):
        waiter.wait(0.0)


class Told(Watch):
    """Notes what it is told to watch over."""

    def __init__(self, beat: float) -> None:
        self.beat = beat
        self.ends: list[tuple[int, ...]] = []

    def over(self, *ends: int) -> None:
        """Note it."""
        self.ends.append(ends)


def test_watches_are_told_as_one() -> None:
    """Each of them, at the interval of the most impatient; those that were removed are closed, and told no more."""
    watches, first, second = Watches(), Told(2.0), Told(1.0)
    anything: Any = (first, second)
    assert watches.beat == math.inf
    for watch in anything:
        watches.add(watch)
    assert watches.beat == 1.0
    watches.over(3, 4)
    watches.alive()
    watches.remove(anything[1])
    assert second.closed
    watches.alive()
    watches.over()
    assert (first.ends, first.alives) == ([(3, 4), ()], 2)
    assert (second.ends, second.alives) == ([(3, 4)], 1)
    assert watches.beat == 2.0
    watches.remove(anything[1])
    watches.close()
    assert first.closed
    assert watches.beat == math.inf


def test_what_is_planned_is_done_once() -> None:
    """When it is due, or before; what is planned later takes its place."""
    later, done = Later(), list[int]()
    assert later.patience == math.inf
    later.run()
    later.plan(1000.0, lambda: done.append(1))
    assert 900.0 < later.patience <= 1000.0
    later.plan(-1.0, lambda: done.append(2))
    assert later.patience == 0.0
    later.run()
    later.run()
    assert done == [2]
