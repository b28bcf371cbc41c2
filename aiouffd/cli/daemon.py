"""Runs a server until it is told to end: signals, a status line or log lines, systemd's socket and notifications."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from rich.logging import RichHandler
from rich.status import Status

from aiouffd.pager.loglines import SWITCH, Lines

if TYPE_CHECKING:
    from rich.console import Console

    from aiouffd.criu.lazy_pages import LazyPages
    from aiouffd.engine.statistics import Statistics
    from aiouffd.server.server import Server

__all__ = ["activated", "log_to", "run", "run_lazy_pages"]

log = logging.getLogger("aiouffd.server")

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_EVERY = 0.25


def activated() -> socket.socket | None:
    """Return the listening socket that systemd has passed (sd_listen_fds), if it has.

    Raises:
        OSError: it has passed something else.
    """
    count = os.environ.get("LISTEN_FDS", "0")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count == "0":
        return None
    os.set_inheritable(_FIRST_FD, False)
    listener = socket.socket(fileno=_FIRST_FD)
    listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if count != "1" or listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM or not listens:
        raise OSError("systemd's socket unit must have exactly one ListenStream=, with a path")
    return listener


def log_to(console: Console, *, level: int = logging.INFO) -> None:
    """Write log records: beside the status line on a terminal, else as lines of `key=value`; the pager's as well."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Lines())
        os.environ[SWITCH] = "1"
    logging.basicConfig(level=level, handlers=[handler], force=True)


async def run(server: Server, console: Console, *, fill: bool, where: str) -> int:
    """Serve until SIGTERM or SIGINT; then take no new clients, and fill or keep those that are there.

    A second signal ends this process at once; the pager goes on serving by itself.

    Args:
        server: not entered yet.
        console: for the status line.
        fill: bring at the end all that the clients miss, and let them go; else wait until they go.
        where: the address, for the log.

    Raises:
        PagerDiedError: nobody can be served any more: another process may do.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    async with server:
        log.info("listening on %s; pager %s", where, server.pids[0])
        _notify("READY=1")
        status = loop.create_task(_show(server, console)) if console.is_terminal else None
        told, dead = loop.create_task(signals.get()), loop.create_task(server.wait_dead())
        try:
            await _first(told, dead)
            name = told.result().name
            server.stop_listening()
            _notify("STOPPING=1")
            if server.clients:
                doing = "filling" if fill else "serving on until they go:"
                log.info("%s: no new clients; %s %d", name, doing, len(server.clients))
            told = loop.create_task(signals.get())
            ending = loop.create_task(_end(server, fill=fill))
            await _first(ending, told, dead)
            ending.cancel()
            if server.clients:
                log.warning(
                    "ended again: the pager (%d) serves %d clients on by itself", server.pids[0], len(server.clients)
                )
        finally:
            told.cancel()
            dead.cancel()
            if status is not None:
                status.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await status
    log.info("ended")
    return 0


async def run_lazy_pages(service: LazyPages, console: Console) -> int:
    """Serve one restore until all is there; SIGTERM or SIGINT leaves what is served to the pager.

    What only a page server has comes through this process: the first signal is answered when all is there then, and
    the second one loses the rest.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)

    def ready() -> None:
        log.info("listening; pager %s", service.pids[0])
        _notify("READY=1")

    serving = loop.create_task(service.run(ready))
    told = loop.create_task(signals.get())
    status = loop.create_task(_show(service, console)) if console.is_terminal else None
    try:
        await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
        if told.done() and service.holds_pages:
            name = told.result().name
            log.warning("%s: the page server's pages come through here: going on; a second signal loses them", name)
            told = loop.create_task(signals.get())
            await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
        if told.done() and not serving.done():
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            if service.holds_pages:
                what = "what is not there yet is lost"
            elif service.tasks:
                what = "what is not there yet is left to the pager"
            else:
                what = "no process has come"
            log.warning("%s: %s", told.result().name, what)
            return 1
        await serving
    finally:
        for task in (told, status):
            if task is not None:
                task.cancel()
    log.info("all is there: %d processes, %d pages", service.tasks, service.pages)
    return 1 if service.errors else 0


async def _first(*tasks: asyncio.Task[Any]) -> None:
    """Wait for the first of the tasks; raise what it has raised."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _end(server: Server, *, fill: bool) -> None:
    if fill:
        await server.fill()
    await server.wait_clients()


async def _show(server: Server | LazyPages, console: Console) -> None:
    with Status("starting", console=console) as status:
        await asyncio.sleep(_EVERY)
        before = server.statistics()
        while True:
            await asyncio.sleep(_EVERY)
            now = server.statistics()
            status.update(_line(now, before))
            before = now


def _line(now: Statistics, before: Statistics) -> str:
    rate = (now.pages - before.pages) / _EVERY
    fetched = (now.bytes_fetched - before.bytes_fetched) / _EVERY / (1 << 20)
    text = f"{now.clients} clients  {now.pages:,} pages ({rate:,.0f}/s)  {now.faults:,} faults  {fetched:,.0f} MiB/s"
    if now.restarts:
        text += f"  {now.restarts} worker restarts"
    return text + (f"  {now.source_errors} source errors" if now.source_errors else "")


def _notify(state: str) -> None:
    """Tell systemd (sd_notify), if it asked for that."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, contextlib.suppress(OSError):
            notifier.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
