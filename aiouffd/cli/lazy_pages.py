"""`aiouffd lazy-pages`: serve one `criu restore --lazy-pages`, in place of `criu lazy-pages`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import click

from aiouffd.cli import daemon, parameters
from aiouffd.criu.lazy_pages import LazyPages
from aiouffd.criu.page_server import HEADER_4_1, HEADER_4_2
from aiouffd.engine.options import Options
from aiouffd.loops import new_event_loop
from aiouffd.report.words import several

if TYPE_CHECKING:
    import signal

    from rich.console import Console

__all__ = ["command"]

log: logging.Logger = logging.getLogger("aiouffd.lazy_pages")

_HEADERS = {"4.1": HEADER_4_1, "4.2": HEADER_4_2}
_DIRECTORY = click.Path(exists=True, file_okay=False)


@click.command("lazy-pages")
@click.option("-D", "--images-dir", "images", required=True, type=_DIRECTORY, help="The directory of the images.")
@click.option(
    "-W", "--work-dir", "work", type=_DIRECTORY, help="Where `criu restore` looks for the socket, if elsewhere."
)
@click.option("--page-server", metavar="ADDRESS", help="Fetch lazy pages from `criu dump --lazy-pages` there.")
@click.option("--port", type=click.IntRange(1, 65535), help="The port of the page server.")
@click.option(
    "--criu",
    type=click.Choice(list(_HEADERS)),
    help="The version of the CRIU that dumps: up to 4.1, or 4.2 and later. By default the images tell it.",
)
@click.option(
    "--background/--no-background",
    default=True,
    show_default=True,
    help="Fill all pages without faults, and end when that is done.",
)
@parameters.readahead
def command(
    *,
    images: str,
    work: str | None,
    page_server: str | None,
    port: int | None,
    criu: str | None,
    background: bool,
    readahead: int,
) -> int:
    """Serve `criu restore --lazy-pages`, in place of `criu lazy-pages`."""
    if (page_server is None) != (port is None):
        raise click.UsageError("--page-server and --port belong together")
    console = daemon.terminal()
    daemon.log_to(console)

    async def main() -> int:
        service = LazyPages(
            images,
            work=work,
            page_server=(page_server, port) if page_server is not None and port is not None else None,
            header=None if criu is None else _HEADERS[criu],
            options=Options(readahead=readahead),
            background=background,
        )
        return await _serve(service, console)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main())


async def _serve(service: LazyPages, console: Console | None) -> int:
    """Serve one restore until all pages are there. A signal leaves what is served to the pager.

    Pages of a page server come through this process. So the first signal waits for them; a second one loses them.
    """
    loop = asyncio.get_running_loop()
    signals = daemon.end_signals()

    def ready() -> None:
        log.info("listening; pager %s", service.pids[0])
        daemon.notify("READY=1")

    serving = loop.create_task(service.run(ready))
    told = loop.create_task(signals.get())
    try:
        async with daemon.shown(service, console):
            await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
            if told.done() and service.holds_pages:
                name = told.result().name
                log.warning("%s: going on until the page server's pages are there; a second signal loses them", name)
                told = loop.create_task(signals.get())
                await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
            if told.done() and not serving.done():
                return await _give_up(service, serving, told.result())
            await serving
    finally:
        told.cancel()
    processes = several(service.tasks, "process", "processes")
    log.info("all pages are there: %s, %s", processes, several(service.pages, "page"))
    return 1 if service.errors else 0


async def _give_up(service: LazyPages, serving: asyncio.Task[None], number: signal.Signals) -> int:
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    if service.holds_pages:
        outcome = "missing pages are lost"
    elif service.tasks:
        outcome = "missing pages are left to the pager"
    else:
        outcome = "no process has come"
    log.warning("%s: %s", number.name, outcome)
    return 1
