"""The commands that serve others' memory: what their options mean."""

from __future__ import annotations

import asyncio
import contextlib
import string
from typing import TYPE_CHECKING, Any

import uvloop
from rich.console import Console

from aiouffd import daemon
from aiouffd.engine.assembly import Options
from aiouffd.errors import HandoffError
from aiouffd.lazy_pages import LazyPages
from aiouffd.metrics import Metrics, expose
from aiouffd.server import Server
from aiouffd.sources.criu_page_server import HEADER_4_1, HEADER_4_2
from aiouffd.sources.resolve import as_source

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.handoff.receive import Peer
    from aiouffd.sources.base import Source

__all__ = ["choose_by", "lazy_pages", "serve"]

_FIELDS = {"pid", "uid", "number", "name"}


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
    listener = None
    if path is None:
        listener = daemon.activated()
        if listener is None:
            raise OSError("--socket PATH says where to listen (there is no socket from systemd)")
    chosen: Source | Callable[[Peer, int, str], Source]
    if source is not None:
        chosen = as_source(source)
        _ = chosen.size  # what is wrong with it is said at once
    else:
        chosen = choose_by(source_for or "")
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


def choose_by(template: str) -> Callable[[Peer, int, str], Source]:
    """Return the function that finds a client's source by a template: `/snapshots/{name}.mem`.

    Raises:
        OSError: the template names what there is not.
    """
    names = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    if names - _FIELDS:
        raise OSError(f"--source-for knows {', '.join(sorted(_FIELDS))}, not {', '.join(sorted(names - _FIELDS))}")
    known: dict[str, Source] = {}

    def choose(peer: Peer, number: int, name: str) -> Source:
        if "name" in names and (not name or name.startswith(".") or "/" in name or "\0" in name):
            raise HandoffError(str(peer), f"asks for the source {name!r}, which is no name")
        target = template.format(pid=peer.pid, uid=peer.uid, number=number, name=name)
        if target not in known:
            known[target] = as_source(target)
        return known[target]

    return choose


def _run(server: Any, metrics: tuple[str, int] | None, *, fill: bool, where: str) -> int:
    console = Console(stderr=True)
    daemon.log_to(console)
    with contextlib.ExitStack() as stack:
        if metrics is not None:
            web = expose(Metrics(server.statistics, lambda: server.rejected), *metrics)
            stack.callback(web.shutdown)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(daemon.run(server, console, fill=fill, where=where))
