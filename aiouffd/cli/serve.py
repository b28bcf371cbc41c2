"""`aiouffd serve`: serve the memory of other processes that connect to a socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import resource
import string
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from aiouffd.cli import daemon, parameters
from aiouffd.engine.loops import new_event_loop
from aiouffd.errors import HandoffError
from aiouffd.server.metrics import Metrics, expose
from aiouffd.server.server import Server
from aiouffd.sources.resolve import as_source

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.handoff.receive import Peer
    from aiouffd.sources.base import Source

__all__ = ["choose_by", "command"]

log = logging.getLogger("aiouffd.server")

_FIELDS = {"pid", "uid", "number", "name"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:=@+~-]{0,199}")  # one part of a path or URL, with nothing to escape


@click.command("serve")
@click.argument("source", required=False)
@click.option("--socket", "path", type=click.Path(), help="Listen here; not with systemd's socket activation.")
@click.option(
    "--source-for", metavar="TEMPLATE", help="A path or URL for each client, from {pid} {uid} {number} {name}."
)
@click.option("--mode", type=parameters.FileMode(), default="600", show_default=True, help="Of the socket's file.")
@click.option("--allow-uid", "uids", type=int, multiple=True, help="A further user that may connect; repeatable.")
@click.option("--record", type=click.Path(), help="Write the order of first touches to this file.")
@click.option("--replay", type=click.Path(), help="Prefetch the pages of a recorded file for each client.")
@click.option(
    "--handoff-timeout",
    type=parameters.Seconds(0, min_open=True),
    metavar="SECONDS",
    default=5.0,
    show_default=True,
    help="The time that a client has to send its handoff.",
)
@parameters.readahead
@click.option(
    "--spin-us",
    type=click.IntRange(0),
    metavar="US",
    default=50,
    show_default=True,
    help="Microseconds to poll for further faults before sleeping.",
)
@click.option(
    "--background",
    type=parameters.Rate(),
    metavar="BYTES",
    default="0",
    show_default=True,
    help="Bytes per second to fill without a fault, or max.",
)
@click.option(
    "--timeout",
    type=parameters.Seconds(0, min_open=True),
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    help="For one read of the source.",
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    metavar="TIMES",
    help="Of a failed read. By default 4 for a file, and as many as the timeout allows for a URL.",
)
@click.option(
    "--concurrent-reads",
    type=click.IntRange(1),
    metavar="READS",
    default=128,
    show_default=True,
    help="The most reads of the source at once.",
)
@click.option(
    "--bytes-in-flight",
    type=parameters.Size(1 << 20),
    metavar="BYTES",
    default="128M",
    show_default=True,
    help="The most bytes of these reads together.",
)
@click.option(
    "--metrics", type=parameters.Address(), metavar="[HOST:]PORT", help="Answer Prometheus at this address, /metrics."
)
@click.option(
    "--on-reject",
    type=click.Choice(["poison", "kill", "hold"]),
    default="poison",
    show_default=True,
    help="What becomes of a microVM that is turned away, whose threads would wait for ever: make its memory SIGBUS"
    " (Linux 6.6), kill it, or let it wait.",
)
@click.option(
    "--on-term",
    type=click.Choice(["keep", "fill"]),
    default="keep",
    show_default=True,
    help="What SIGTERM, SIGINT and SIGHUP do for clients: serve them until they leave, or first fill all their missing"
    " pages. A second signal leaves them to the pager, which goes on without this process.",
)
def command(
    *,
    source: str | None,
    source_for: str | None,
    path: str | None,
    metrics: tuple[str, int] | None,
    on_term: str,
    **options: Any,
) -> int:
    """Serve the memory of other processes: microVMs (Firecracker's handoff), and Monitors of aiouffd.

    SOURCE is a path or a URL (http, s3, gs, az). All clients see the same one.

    \b
    aiouffd serve snapshot.mem --socket /run/uffd.sock
    aiouffd serve https://host/snapshot.mem --socket /run/uffd.sock --background 200M
    aiouffd serve --source-for '/snapshots/{name}.mem' --socket /run/uffd.sock
    """  # noqa: D301 - a backspace is click's mark for lines that are kept
    if (source is None) == (source_for is None):
        raise click.UsageError("give either SOURCE or --source-for")
    if options["record"] and options["replay"]:
        raise click.UsageError("give either --record or --replay: a recording does not see pages that a replay brings")
    # A client takes some descriptors. The soft limit of 1024 is there for users of select(2).
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listener = None
    if path is None:
        listener = daemon.activated()
        if listener is None:
            raise OSError("--socket PATH says where to listen (there is no socket from systemd)")
    chosen: Source | Callable[[Peer, int, str], Source]
    if source is not None:
        chosen = as_source(source, timeout=options["timeout"], retries=options["retries"])
        if not chosen.size:
            raise OSError(f"{source}: has no bytes, so no client could be served")
    else:
        chosen = choose_by(source_for or "", timeout=options["timeout"], retries=options["retries"])
    server = Server(chosen, path, listener=listener, **options)
    console = Console(stderr=True)
    daemon.log_to(console)
    with contextlib.ExitStack() as stack, asyncio.Runner(loop_factory=new_event_loop) as runner:
        if metrics is not None:
            try:
                web = expose(Metrics(server.statistics, lambda: server.rejected), *metrics)
            except OSError as error:
                address = f"--metrics {metrics[0]}:{metrics[1]}"
                raise OSError(error.errno, f"{error.strerror}: another port?", address) from None
            stack.callback(web.shutdown)
        return runner.run(_serve(server, console, fill=on_term == "fill", where=path or "systemd's socket"))


def choose_by(template: str, **options: Any) -> Callable[[Peer, int, str], Source]:
    """Return the function that finds a client's source by a template: `/snapshots/{name}.mem`.

    Args:
        template: a path or a URL.
        **options: for sources behind URLs.

    Raises:
        OSError: the template has an unknown field, or none.
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        fields = {field or "" for _, field, _, _ in parts}
    except ValueError as error:
        raise OSError(f"--source-for {template!r}: {error}; write for example /snapshots/{{name}}.mem") from None
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise OSError(f"--source-for {template!r}: fields take no format")
    if not fields or fields - _FIELDS:
        wrong = ", ".join(sorted(fields - _FIELDS)) or "nothing" if fields else "a fixed place: that is SOURCE"
        raise OSError(f"--source-for {template!r}: knows {', '.join(sorted(_FIELDS))}, not {wrong}")

    def choose(peer: Peer, number: int, name: str) -> Source:
        if "name" in fields and not _NAME.fullmatch(name):
            raise HandoffError(str(peer), f"asks for the source {name!r:.100}, which is no name")
        # Opened again for each client: another snapshot may have the name by now.
        return as_source(template.format(pid=peer.pid, uid=peer.uid, number=number, name=name), **options)

    return choose


async def _serve(server: Server, console: Console, *, fill: bool, where: str) -> int:
    """Serve until a signal; then take no new clients, and fill or keep those that are there.

    A second signal ends this process at once; the pager goes on serving by itself.

    Args:
        server: not entered yet.
        console: for the status line.
        fill: fill all missing pages of the clients at the end, and release them; else wait until they leave.
        where: the address, for the log.

    Raises:
        PagerDiedError: nobody can be served any more; a new process can.
    """
    loop = asyncio.get_running_loop()
    signals = daemon.end_signals()
    async with server, daemon.shown(server, console):
        log.info("listening on %s; pager %s", where, server.pids[0])
        daemon.notify("READY=1")
        told, dead = loop.create_task(signals.get()), loop.create_task(server.wait_dead())
        try:
            await daemon.first(told, dead)
            name = told.result().name
            server.stop_listening()
            daemon.notify("STOPPING=1")
            doing = "filling" if fill else "serving on until they leave:"
            log.info("%s: no new clients; %s %d", name, doing, len(server.clients))
            told = loop.create_task(signals.get())
            ending = loop.create_task(_end(server, fill=fill))
            await daemon.first(ending, told, dead)
            ending.cancel()
            if server.clients:
                log.warning(
                    "%s: the pager (%d) serves %d clients on by itself",
                    told.result().name,
                    server.pids[0],
                    len(server.clients),
                )
        finally:
            told.cancel()
            dead.cancel()
    log.info("ended")
    return 0


async def _end(server: Server, *, fill: bool) -> None:
    if fill:
        await server.fill()
    await server.wait_clients()
