"""`aiouffd serve`: serve the memory of other processes that connect to a socket."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import resource
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from aiouffd import __version__
from aiouffd.cli import daemon, parameters
from aiouffd.engine.ahead.pages import Recording
from aiouffd.errors import HandoffError
from aiouffd.loops import new_event_loop
from aiouffd.pager.process.handles import grow_table
from aiouffd.report.perfetto import FaultLog
from aiouffd.report.words import several
from aiouffd.server.clashes import CHOSEN, ClashError, check
from aiouffd.server.metrics import Endpoint, Metrics
from aiouffd.server.server import Server
from aiouffd.server.successor import SYSTEMD
from aiouffd.store.cache import SMALLEST, ChunkCache
from aiouffd.store.resolve import as_layers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from aiouffd.handoff.receive import Peer
    from aiouffd.otel.sdk import Telemetry
    from aiouffd.server.control.api import Control
    from aiouffd.server.dashboard.http import Dashboard
    from aiouffd.sources.base import Source

__all__ = ["choose_by", "command"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_ON_REJECT = (
    "What becomes of a microVM that is turned away, and would wait for its pages for ever: its memory is SIGBUS (Linux"
    " 6.6), it is killed, or it waits."
)
_ON_FAILURE = (
    "What becomes of a client whose page cannot be had, after all tries: the page is SIGBUS, the client is killed, or"
    " its threads wait while the page is asked for again and again."
)
_ON_TERM = (
    "What SIGTERM, SIGINT and SIGHUP do for clients: serve them until they leave, or first fill all their missing"
    " pages; or leave them to the next server, with --hold. A second signal leaves them to the pager, which goes on"
    " without this process."
)
_HOLD = (
    "Clients, sockets and sessions outlive this server and its pager, however they end: a process holds them, and gives"
    " them to the next server that is started with this path. `systemd`: its store of file descriptors does."
)
_NYDUS_ANSWERS = "What precedes each answer to a client of nydus: its length (u32, little-endian), or nothing."
_ONE_COPY = (
    "Send each client a file of memory to map privately, with pages of 4 KiB or of 2 MiB: what they read is there once"
    " for all of them."
)
_TAKEOVER = "Take them over also from a server that lives: it ends when this one serves."
_CLIENT_EVENTS = "The most events per second (faults, layout events) of one client. [default: no limit]"
_CLIENT_BYTES = "The most bytes per second that are placed for one client, filling included. [default: no limit]"
_DIFF = (
    "A sparse file over SOURCE, whose holes show what is below: a Diff snapshot. Repeatable, the lowest first; with"
    " --source-for a template as well."
)
_RECENT = (
    "The most bytes of what was read last, of all sources that are far, to keep in memory for other clients of the same"
    " source."
)
_CONTROL = "Answer `aiouffd ctl` on this socket, which has sessions created and deleted; SOURCE may be left out then."
_HTTP = "Show a browser there what the sessions do. Other machines need --http-token-file."
_OTEL = "Send traces and metrics by OpenTelemetry, as the environment variables OTEL_* say. Needs the extra `otel`."
_PERFETTO = "Write the faults that wait for a read to this file, by time and with their cause, for ui.perfetto.dev."
_WHO_LOOKS = "A file with a token; who has it may look: http://HOST:PORT/?token=TOKEN"
_OF_SERVER = {
    *("folder", "cache_size", "recent", "metrics", "control", "http", "token_file"),
    *("on_term", "hold", "takeover", "otel", "perfetto"),
}
_FIELDS = {"pid", "uid", "number", "name"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:=@+~-]{0,199}")  # one part of a path or URL, with nothing to escape


_option = functools.partial(click.option, show_default=True)
_SECONDS = parameters.Seconds(0, min_open=True)


@click.command("serve")
@click.argument("source", required=False)
@_option("--socket", "path", type=click.Path(), help="Listen here; not with systemd's socket activation.")
@_option("--source-for", metavar="TEMPLATE", help="A path or URL for each client, from {pid} {uid} {number} {name}.")
@_option("--diff", "diffs", metavar="PATH", multiple=True, help=_DIFF)
@_option("--cache", "folder", type=click.Path(), help="Keep what comes from URLs here, for all processes of this user.")
@_option("--cache-size", type=parameters.Size(SMALLEST), default="50G", help="The most bytes of the cache's chunks.")
@_option("--mode", type=parameters.FileMode(), default="600", help="Of the socket's file.")
@_option("--allow-uid", "uids", type=int, multiple=True, help="A further user that may connect; repeatable.")
@_option("--record", type=click.Path(), help="Write the order of first touches to this file or directory.")
@_option("--record-pages", type=parameters.Size(4096), help="Also keep so many bytes of pages in it. [default: none]")
@_option("--replay", type=click.Path(), help="Prefetch what was recorded there, for each client.")
@_option("--handoff-timeout", type=_SECONDS, default=5.0, help="Seconds that a client has to send its handoff.")
@_option("--nydus-answers", type=click.Choice(["length", "bare"]), default="length", help=_NYDUS_ANSWERS)
@parameters.readahead
@_option("--spin-us", type=click.IntRange(0), default=50, help="Microseconds to poll for faults before sleeping.")
@_option("--background", type=parameters.Rate(), default="0", help="Bytes per second to fill without a fault, or max.")
@_option("--timeout", type=_SECONDS, default=30.0, help="Seconds for opening a source, and for each read of it.")
@_option("--retries", type=click.IntRange(0), help="Of a failed read. [default: 4 of a file, of a URL until --timeout]")
@_option("--concurrent-reads", type=click.IntRange(1), default=128, help="The most reads of sources at once.")
@_option("--bytes-in-flight", type=parameters.Size(1 << 20), default="128M", help="The most bytes of these reads.")
@_option("--recent", type=parameters.Size(), default="128M", help=_RECENT)
@_option("--client-events", type=click.IntRange(1), help=_CLIENT_EVENTS)
@_option("--client-bytes", type=parameters.Size(1 << 20), help=_CLIENT_BYTES)
@_option("--one-copy", type=click.Choice(["small", "huge"]), help=_ONE_COPY)
@_option("--metrics", type=parameters.Address(), metavar="[HOST:]PORT", help="Answer Prometheus there, at /metrics.")
@_option("--control", type=click.Path(), metavar="PATH", help=_CONTROL)
@_option("--hold", type=click.Path(), metavar="PATH", help=_HOLD)
@_option("--takeover", is_flag=True, help=_TAKEOVER)
@_option("--http", type=parameters.Address(), metavar="[HOST:]PORT", help=_HTTP)
@_option("--http-token-file", "token_file", type=click.Path(), help=_WHO_LOOKS)
@_option("--otel", is_flag=True, help=_OTEL)
@_option("--perfetto", type=click.Path(dir_okay=False), help=_PERFETTO)
@_option("--on-reject", type=click.Choice(["poison", "kill", "hold"]), default="poison", help=_ON_REJECT)
@_option("--on-failure", type=click.Choice(["poison", "kill", "hold"]), default="poison", help=_ON_FAILURE)
@_option("--on-term", type=click.Choice(["keep", "fill", "leave"]), default="keep", help=_ON_TERM)
def command(
    *,
    source: str | None,
    source_for: str | None,
    diffs: tuple[str, ...],
    folder: str | None,
    cache_size: int,
    path: str | None,
    metrics: tuple[str, int] | None,
    control: str | None,
    http: tuple[str, int] | None,
    token_file: str | None,
    otel: bool,
    perfetto: str | None,
    on_term: str,
    **options: Any,
) -> int:
    """Serve the memory of other processes: microVMs (Firecracker's handoff), and Monitors of aiouffd.

    SOURCE is a path or a URL (http, s3, gs, az). All clients see the same one.

    \b
    aiouffd serve snapshot.mem --socket /run/uffd.sock
    aiouffd serve https://host/snapshot.mem --socket /run/uffd.sock --background 200M
    aiouffd serve base.mem --diff monday.diff --diff tuesday.diff --socket /run/uffd.sock
    aiouffd serve --source-for '/snapshots/{name}.mem' --socket /run/uffd.sock
    """  # noqa: D301 - a backspace is click's mark for lines that are kept
    alone = control is not None and source is None and source_for is None
    _check(source, source_for, options, alone=alone)
    _raise_limit()
    listener = None
    if path is None and not alone:
        listener = daemon.activated()
        if listener is None:
            raise click.UsageError("--socket PATH says where to listen (there is no socket from systemd)")
    cache = None if folder is None else ChunkCache(folder, cache_size)
    chosen: Source | Callable[[Peer, int, str], Source] | None = None
    if source is not None:
        chosen = as_layers([source, *diffs], timeout=options["timeout"], retries=options["retries"], cache=cache)
        if not chosen.size:
            raise OSError(f"{source}: has no bytes, so no client could be served")
    elif source_for is not None:
        chosen = choose_by(source_for, diffs, timeout=options["timeout"], retries=options["retries"], cache=cache)
    token = "" if token_file is None else _token_in(token_file)
    told = _told(perfetto, otel=otel)
    named = {"socket": path, "control": control, "record": options["record"], "replay": options["replay"]}
    server = Server(chosen, path, listener=listener, record=_recording(options), **options)
    console = daemon.terminal()
    daemon.log_to(console)
    places = {str(item): f"--{option} {item}" for option, item in named.items() if item is not None}
    where = "sockets of sessions" if alone else path or "systemd's socket"
    outside = [_endpoint(server, metrics), _dashboard(server, http, token)]
    inside = [_control(server, control, cache), daemon.shown(server, console)]
    with told, asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            return runner.run(_serve(server, outside, inside, told.leave, on_term=on_term, where=where))
        except OSError as error:
            if error.filename not in places:
                raise
            raise OSError(error.errno, error.strerror, places[error.filename]) from error


def _raise_limit() -> None:
    """A client takes some descriptors. The soft limit of 1024 is there for users of select(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    grow_table()


def _token_in(path: str) -> str:
    """Return the token that a file has; raise OSError if it has none: without one everybody may look."""
    token = Path(path).read_text().strip()
    if not token:
        raise OSError(f"--http-token-file {path}: it is empty, and has no token")
    return token


class _Nobody(contextlib.nullcontext[None]):
    """Is told nothing."""

    def leave(self) -> None:
        """Nothing is left."""


def _told(perfetto: str | None, *, otel: bool) -> FaultLog | Telemetry | _Nobody:
    """Return who is told of the server, from now on."""
    if perfetto is not None and otel:
        raise click.UsageError("give either --otel or --perfetto")
    if perfetto is not None:
        return FaultLog(perfetto)
    if not otel:
        return _Nobody()
    try:
        from aiouffd.otel.sdk import Telemetry  # noqa: PLC0415 - 0.3 s, for few servers
    except ImportError as error:
        raise click.ClickException(f"{error}. `--otel` needs an extra: pip install 'aiouffd[otel]'") from None
    return Telemetry()


def _recording(options: dict[str, Any]) -> Recording | None:
    """Return what is recorded, and leave it out of the options."""
    path, pages = options.pop("record"), options.pop("record_pages")
    return None if path is None else Recording(path, pages=pages or 0)


def _check(source: str | None, source_for: str | None, options: dict[str, Any], *, alone: bool) -> None:
    """Refuse options that do not go together; `alone`: there are only the sessions that --control creates."""
    if not alone and (source is None) == (source_for is None):
        raise click.UsageError("give either SOURCE or --source-for; or --control, and create sessions")
    if options["record_pages"] and not options["record"]:
        raise click.UsageError("--record-pages: needs --record, the file or directory that is to have them")
    given = {name for name, value in options.items() if value} | ({CHOSEN} if source_for is not None else set())
    try:
        check(given)
    except ClashError as error:
        raise click.UsageError(
            error.said(lambda name: "--source-for" if name == CHOSEN else f"--{name.replace('_', '-')}")
        ) from None
    if options["takeover"] and options["hold"] is None:
        raise click.UsageError("--takeover: needs --hold, where the server is asked that is to be taken over from")
    if options["takeover"] and options["hold"] == SYSTEMD:
        raise click.UsageError("--takeover: needs --hold PATH; systemd starts a service when the one before has ended")
    context = click.get_current_context()
    said = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if "cache_size" in said and "folder" not in said:
        raise click.UsageError("--cache-size: needs --cache, the folder that may have this size")
    if alone and (lost := set(said) - _OF_SERVER):
        names = ", ".join(sorted(item.opts[0] for item in context.command.params if item.name in lost))
        raise click.UsageError(f"{names}: needs SOURCE or --source-for; sessions have their own when they are created")


def choose_by(template: str, diffs: Sequence[str] = (), **options: Any) -> Callable[[Peer, int, str], Source]:
    """Return the function that finds a client's source by a template: `/snapshots/{name}.mem`.

    Args:
        template: a path or a URL.
        diffs: templates of paths of the layers over it.
        **options: for sources behind URLs.

    Raises:
        OSError: the template has an unknown field, or none.
    """
    templates = [template, *diffs]
    try:
        parts = [part for text in templates for part in string.Formatter().parse(text) if part[1] is not None]
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
        return as_layers(
            [text.format(pid=peer.pid, uid=peer.uid, number=number, name=name) for text in templates], **options
        )

    return choose


@contextlib.asynccontextmanager
async def _endpoint(server: Server, address: tuple[str, int] | None) -> AsyncIterator[Endpoint | None]:
    """Answer Prometheus while the block runs, if there is an address."""
    if address is None:
        yield None
        return
    async with contextlib.AsyncExitStack() as stack:
        metrics = Metrics(server.statistics, lambda: server.rejected, server.counted)
        with _named(f"--metrics {address[0]}:{address[1]}"):
            endpoint = await stack.enter_async_context(Endpoint(metrics, *address, shared=server.holds))
        yield endpoint


@contextlib.contextmanager
def _named(option: str) -> Iterator[None]:
    """Have the error of an address that cannot be used say which option it was."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0  # negative: of getaddrinfo; else asyncio's text repeats the address
        raise OSError(number, os.strerror(number) if number > 0 else error.strerror, option) from None


@contextlib.asynccontextmanager
async def _dashboard(server: Server, address: tuple[str, int] | None, token: str) -> AsyncIterator[Dashboard | None]:
    """Show a browser what happens while the block runs, if there is an address."""
    if address is None:
        yield None
        return
    from aiouffd.server.dashboard.http import Dashboard  # noqa: PLC0415 - with aiohttp: 0.2 s

    try:
        dashboard = Dashboard(server, *address, token=token, version=__version__, shared=server.holds)
    except ValueError as error:
        raise OSError(f"--http: {error} (--http-token-file)") from None
    async with contextlib.AsyncExitStack() as stack:
        with _named(f"--http {address[0]}:{address[1]}"):
            await stack.enter_async_context(dashboard)
        log.info("a browser sees what happens at http://%s:%d/", address[0], dashboard.port)
        yield dashboard


@contextlib.asynccontextmanager
async def _control(server: Server, path: str | None, cache: ChunkCache | None) -> AsyncIterator[Control | None]:
    """Answer `aiouffd ctl` while the block runs, if there is a path."""
    if path is None:
        yield None
        return
    from aiouffd.server.control.api import Control  # noqa: PLC0415 - with aiohttp: 0.2 s

    async with Control(server, path, cache=cache, version=__version__) as control:
        log.info("answering `aiouffd ctl` on %s", path)
        yield control


async def _serve(
    server: Server,
    outside: Sequence[AbstractAsyncContextManager[Any]],
    inside: Sequence[AbstractAsyncContextManager[Any]],
    leave: Callable[[], None],
    *,
    on_term: str,
    where: str,
) -> int:
    """Serve until a signal; then take no new clients, and fill or keep those that are there, until a second one.

    Args:
        server: not entered yet.
        outside: what is there before the server, and after it; what they yield has a `close`, so that a new process
            can take over its address; or it is None.
        inside: what is there while the server is.
        leave: called before this process ends without being finalized.
        on_term: what becomes of the clients at the end: "fill" brings all their missing pages, and releases them;
            "keep" waits until they leave; "leave" leaves them to the next server.
        where: the address, for the log.

    Raises:
        PagerDiedError: nobody can be served any more; a new process can.
    """
    loop = asyncio.get_running_loop()
    signals = daemon.end_signals()
    async with contextlib.AsyncExitStack() as stack:
        besides = [await stack.enter_async_context(item) for item in outside]
        await stack.enter_async_context(server)
        besides += [await stack.enter_async_context(item) for item in inside]
        log.info("listening on %s; pager %s", where, server.pids[0])
        daemon.notify("READY=1")
        told, dead = loop.create_task(signals.get()), loop.create_task(server.wait_dead())
        taken = loop.create_task(server.wait_taken())
        try:
            await daemon.first(told, dead, taken)
            _leave_if(leave, taken=taken.done(), left=on_term == "leave")
            server.stop_listening()
            for beside in besides:
                if beside is not None:
                    beside.close()
            daemon.notify("STOPPING=1")
            ending = loop.create_task(_end(server, told.result().name, fill=on_term == "fill"))
            told = loop.create_task(signals.get())
            await daemon.first(ending, told, dead)
            ending.cancel()
            if server.clients:
                alone = "%s: the pager (%d) serves %s on by itself"
                log.warning(alone, told.result().name, server.pids[0], several(len(server.clients), "client"))
            if mapping := server.served - len(server.clients):
                log.warning("clients that map files and wait until a server listens again: %d", mapping)
        finally:
            for task in (told, dead, taken):
                task.cancel()
    log.info("ended")
    return 0


def _leave_if(leave: Callable[[], None], *, taken: bool, left: bool) -> None:
    """End at once, if it is so: whatever is closed in order is closed for whoever has it next, too."""
    if taken or left:
        log.info("ended: %s", "another server has taken over" if taken else "left to the next server")
        daemon.notify("STOPPING=1")
        leave()
        logging.shutdown()
        os._exit(0)


async def _end(server: Server, signal: str, *, fill: bool) -> None:
    doing = "filling" if fill else "serving on until they leave:"
    log.info("%s: no new clients; %s %d", signal, doing, len(server.clients) if fill else server.served)
    if fill:
        await server.fill()
    await server.wait_clients()
