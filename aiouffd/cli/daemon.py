"""What the commands that serve have in common: signals, log, status line, systemd's socket and notifications."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, Protocol

from aiouffd.pager.client.fd_store import inherited
from aiouffd.pager.loglines import SWITCH, Lines
from aiouffd.report.words import several

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rich.console import Console

    from aiouffd.engine.statistics import Statistics

__all__ = ["activated", "end_signals", "first", "log_to", "notify", "shown", "terminal"]

_REFRESH = 0.25  # seconds between two states of the status line


class Counted(Protocol):
    """Something that counts what it serves."""

    def statistics(self) -> Statistics:
        """Return what was counted."""


def activated() -> socket.socket | None:
    """Return the listening socket that systemd has passed (sd_listen_fds); None without one.

    Raises:
        OSError: systemd has passed something else.
    """
    given, _ = inherited()
    if not given:
        return None
    listener = socket.socket(fileno=given[0])
    listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if len(given) != 1 or listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM or not listens:
        raise OSError("systemd's socket unit must have exactly one ListenStream=, with a path")
    return listener


def notify(state: str) -> None:
    """Send a state to systemd (sd_notify) where it asked for that."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, contextlib.suppress(OSError):
            notifier.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


def terminal() -> Console | None:
    """Return the terminal that standard error is; None: it is none, and rich is not imported, which takes 30 ms."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console  # noqa: PLC0415

    return Console(stderr=True)


def log_to(console: Console | None, *, level: int = logging.INFO) -> None:
    """Write log records: above the status line on a terminal, else as lines of `key=value`. The pager does the same."""
    handler: logging.Handler
    if console is not None:
        from rich.logging import RichHandler  # noqa: PLC0415 - as above

        handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Lines())
        os.environ[SWITCH] = "1"
    logging.basicConfig(level=level, handlers=[handler], force=True)


def end_signals() -> asyncio.Queue[signal.Signals]:
    """Return a queue of the signals that ask this process to end: SIGTERM, SIGINT, and SIGHUP unless it is ignored."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    wanted = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup(1) ignores it, so that the process outlives its shell
        wanted.append(signal.SIGHUP)
    for number in wanted:
        loop.add_signal_handler(number, signals.put_nowait, number)
    return signals


async def first(*tasks: asyncio.Task[Any]) -> None:
    """Wait for the first of the tasks to finish; raise its exception if it has one."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


@contextlib.asynccontextmanager
async def shown(counted: Counted, console: Console | None) -> AsyncIterator[None]:
    """Show a status line while the block runs, on a terminal."""
    task = asyncio.get_running_loop().create_task(_show(counted, console)) if console is not None else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _show(counted: Counted, console: Console) -> None:
    from rich.status import Status  # noqa: PLC0415 - as above

    with Status("starting", console=console) as status:
        await asyncio.sleep(_REFRESH)
        before = counted.statistics()
        while True:
            await asyncio.sleep(_REFRESH)
            now = counted.statistics()
            status.update(_line(now, before))
            before = now


def _line(now: Statistics, before: Statistics) -> str:
    rate = (now.pages - before.pages) / _REFRESH
    fetched = (now.bytes_fetched - before.bytes_fetched) / _REFRESH / (1 << 20)
    clients, pages, faults = (several(getattr(now, f"{one}s"), one) for one in ("client", "page", "fault"))
    text = f"{clients}  {pages} ({rate:,.0f}/s)  {faults}  {fetched:,.0f} MiB/s"
    if now.restarts:
        text += f"  {several(now.restarts, 'worker restart')}"
    return text + (f"  {several(now.source_errors, 'source error')}" if now.source_errors else "")
