"""The commands that serve others' memory: what their options mean."""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import string
from typing import TYPE_CHECKING, Any

import uvloop
from rich.console import Console

from aiouffd.cli import daemon
from aiouffd.criu.lazy_pages import LazyPages
from aiouffd.criu.page_server import HEADER_4_1, HEADER_4_2
from aiouffd.engine.assembly import Options
from aiouffd.errors import HandoffError
from aiouffd.server.metrics import Metrics, expose
from aiouffd.server.server import Server
from aiouffd.sources.resolve import as_source

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.handoff.receive import Peer
    from aiouffd.sources.base import Source

__all__ = ["choose_by", "lazy_pages", "serve"]

_FIELDS = {"pid", "uid", "number", "name"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:=@+~-]{0,199}")  # one part of a path or URL, with nothing to escape


def serve(
    source: str | None,
    source_for: str | None,
    path: str | None,
    *,
    metrics: tuple[str, int] | None,
    fill: bool,
    **options: Any,
) -> int:
    """Run `aiouffd serve`; return its exit status."""
    # Some descriptors for each client: the soft limit of 1024 is for users of select(2).
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listener = None
    if path is None:
        listener = daemon.activated()
        if listener is None:
            raise OSError("--socket PATH says where to listen (there is no socket from systemd)")
    chosen: Source | Callable[[Peer, int, str], Source]
    if source is not None:
        chosen = as_source(source, timeout=options["timeout"])
        if not chosen.size:  # whatever is wrong with it is said at once
            raise OSError(f"{source}: has no bytes, of which no client could be served")
    else:
        chosen = choose_by(source_for or "", timeout=options["timeout"])
    server = Server(chosen, path, listener=listener, **options)
    return _run(server, metrics, fill=fill, where=path or "systemd's socket")


def lazy_pages(
    *,
    images: str,
    work: str | None,
    page_server: tuple[str, int] | None,
    criu: str,
    background: bool,
    readahead: int,
) -> int:
    """Run `aiouffd lazy-pages`; return its exit status."""
    console = Console(stderr=True)
    daemon.log_to(console)

    async def main() -> int:
        service = LazyPages(
            images,
            work=work,
            page_server=page_server,
            header=HEADER_4_2 if criu == "4.2" else HEADER_4_1,
            options=Options(readahead=readahead),
            background=background,
        )
        return await daemon.run_lazy_pages(service, console)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def choose_by(template: str, **options: Any) -> Callable[[Peer, int, str], Source]:
    """Return the function that finds a client's source by a template: `/snapshots/{name}.mem`.

    Args:
        template: a path or a URL.
        **options: for sources behind URLs.

    Raises:
        OSError: the template names what there is not.
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        fields = {field or "" for _, field, _, _ in parts}
    except ValueError as error:
        raise OSError(f"--source-for {template!r}: {error}; write for example /snapshots/{{name}}.mem") from None
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise OSError(f"--source-for {template!r}: names take no format")
    if not fields or fields - _FIELDS:
        wrong = ", ".join(sorted(fields - _FIELDS)) or "nothing" if fields else "a fixed place: that is SOURCE"
        raise OSError(f"--source-for knows {', '.join(sorted(_FIELDS))}, not {wrong}")

    def choose(peer: Peer, number: int, name: str) -> Source:
        if "name" in fields and not _NAME.fullmatch(name):
            raise HandoffError(str(peer), f"asks for the source {name!r:.100}, which is no name")
        # Opened anew for each client: what lies at that name may be another snapshot by now.
        return as_source(template.format(pid=peer.pid, uid=peer.uid, number=number, name=name), **options)

    return choose


def _run(server: Any, metrics: tuple[str, int] | None, *, fill: bool, where: str) -> int:
    console = Console(stderr=True)
    daemon.log_to(console)
    with contextlib.ExitStack() as stack:
        if metrics is not None:
            try:
                web = expose(Metrics(server.statistics, lambda: server.rejected), *metrics)
            except OSError as error:
                address = f"--metrics {metrics[0]}:{metrics[1]}"
                raise OSError(error.errno, f"{error.strerror}: another port?", address) from None
            stack.callback(web.shutdown)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(daemon.run(server, console, fill=fill, where=where))
