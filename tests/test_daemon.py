"""`cli.daemon`: signals, and the status line's text. What needs a whole server is in tests/kernel."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from typing import TYPE_CHECKING

import attrs
import pytest

from aiouffd.cli import daemon
from aiouffd.engine.statistics import Counters

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def dispositions() -> Iterator[None]:
    """Put the signals' handlers back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_each_signal_that_asks_to_end_arrives(number: signal.Signals) -> None:
    """SIGHUP as well: by default it would end the process without a word."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signals = daemon.end_signals()
    os.kill(os.getpid(), number)
    async with asyncio.timeout(60):
        assert await signals.get() == number


async def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """The process was started by nohup: it is to outlive its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = daemon.end_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(60):
        assert await signals.get() == signal.SIGTERM


async def test_the_first_task_that_fails_is_raised() -> None:
    """And one that succeeds ends the wait."""
    loop = asyncio.get_running_loop()

    async def fail() -> None:
        raise ValueError("no")

    never = loop.create_task(asyncio.Event().wait())
    await daemon.first(never, loop.create_task(asyncio.sleep(0)))
    with pytest.raises(ValueError, match="no"):
        await daemon.first(never, loop.create_task(fail()))
    never.cancel()


def test_a_status_line_is_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else there is none."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert daemon.terminal() is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    console = daemon.terminal()
    assert console is not None
    assert console.file is sys.stderr


def test_the_status_line() -> None:
    """Rates since the last look; restarts and errors only where there are some."""
    before = Counters().snapshot()
    now = attrs.evolve(before, clients=2, faults=7, pages_fault=500, bytes_fetched=1 << 20)
    assert daemon._line(now, before) == "2 clients  500 pages (2,000/s)  7 faults  4 MiB/s"
    failing = attrs.evolve(now, restarts=3, source_errors=1)
    assert daemon._line(failing, now).endswith("0 MiB/s  3 worker restarts  1 source error")
