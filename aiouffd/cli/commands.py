"""The commands, on click. `aiouffd.cli` imports this where the extra is installed."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import click

import aiouffd

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Size", "group"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.3
    """Bytes, with an optional unit: 65536, 64K, 1G, 1GiB."""

    name = "size"

    def __init__(self, least: int = 0) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size: write for example 65536, 64K, 256M or 1G", param, ctx)
        size = int(match[1]) * _UNITS[match[2].upper()]
        if size < self._least:
            self.fail(f"{value} is too little: {self._least} at least", param, ctx)
        return size


class Seconds(click.FloatRange):
    """A range that "nan" is not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("is no number", param, ctx)
        return number


class Octal(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.3
    """Permission bits: 600, 0660."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bits."""
        if isinstance(value, int):
            return value
        if not re.fullmatch(r"0?[0-7]{3}", value):
            self.fail(f"{value!r} is no mode: write for example 600 or 660", param, ctx)
        return int(value, 8)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(aiouffd.__version__, prog_name="aiouffd")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def group(*, debug: bool) -> None:
    """Memory that fills itself on first touch: Linux userfaultfd for Python."""


@group.command()
@click.option("--size", type=Size(), default="1G", show_default=True, help="Of the input file that the demo makes.")
@click.option("--threads", type=click.IntRange(1, 64), default=4, show_default=True, help="That touch at random.")
@click.option("--touches", type=click.IntRange(1), default=4000, show_default=True, help="Pages touched at random.")
@click.option("--latency-ms", type=float, default=0.0, show_default=True, help="Of the page server, to play far away.")
def demo(*, size: int, threads: int, touches: int, latency_ms: float) -> int:
    """Map a file that a page server holds, touch it with numpy, and check every byte that was touched."""
    try:
        from aiouffd.cli import demo as program  # noqa: PLC0415 - needs numpy and obstore
    except ImportError as error:
        raise click.ClickException(f"{error}. The demo needs an extra: pip install 'aiouffd[demo]'") from error
    return program.run(size=size, threads=threads, touches=touches, latency=latency_ms / 1000)


class Rate(Size):
    """Bytes per second, or `max`."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; infinity for `max`."""
        return math.inf if value == "max" else float(super().convert(value, param, ctx))


class Address(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.3
    """HOST:PORT, or PORT on the loopback interface."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Return host and port."""
        if isinstance(value, tuple):
            return value
        host, _, port = value.rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            self.fail(f"{value!r} is no address: write for example 127.0.0.1:9100, [::1]:9100 or 9100", param, ctx)
        return host.strip("[]") or "127.0.0.1", int(port)


_SERVING = [
    click.option("--readahead", type=Size(), metavar="BYTES", default="2M", show_default=True,
                 help="The largest window that a fault brings; 0: page by page."),
    click.option("--spin-us", type=click.IntRange(0), metavar="US", default=50, show_default=True,
                 help="Microseconds to look again for faults before sleeping."),
    click.option("--background", type=Rate(), metavar="BYTES", default="0", show_default=True,
                 help="Bytes per second to bring without being asked, or max."),
    click.option("--timeout", type=Seconds(0, min_open=True), metavar="SECONDS", default=30.0,
                 show_default=True, help="For one read of the source."),
    click.option("--retries", type=click.IntRange(0), metavar="TIMES", default=4, show_default=True,
                 help="Of a read of a file that failed; of a URL, as often as the timeout allows."),
    click.option("--concurrent-reads", type=click.IntRange(1), metavar="READS", default=128, show_default=True,
                 help="Reads of the source under way at once."),
    click.option("--bytes-in-flight", type=Size(1 << 20), metavar="BYTES", default="128M", show_default=True,
                 help="Bytes of these reads, all together."),
    click.option("--metrics", type=Address(), metavar="[HOST:]PORT", help="Answer Prometheus there, at /metrics."),
    click.option("--on-term", type=click.Choice(["keep", "fill"]), default="keep", show_default=True,
                 help="What SIGTERM does for clients: serve them until they go, or bring all they miss first. A second"
                 " signal leaves them to the pager, which does not need this process."),
]  # fmt: skip


def _serving(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SERVING):
        command = option(command)
    return command


@group.command()
@click.argument("source", required=False)
@click.option("--socket", "path", type=click.Path(), help="To listen on; not with systemd's socket activation.")
@click.option("--source-for", metavar="TEMPLATE", help="A path or URL by client: {pid} {uid} {number} {name}.")
@click.option("--mode", type=Octal(), default="600", show_default=True, help="Of the socket.")
@click.option("--allow-uid", "uids", type=int, multiple=True, help="Another user that may connect; repeatable.")
@click.option("--record", type=click.Path(), help="Write the order of first touches to this file.")
@click.option("--replay", type=click.Path(), help="Bring the pages of a recorded file ahead, for each client.")
@click.option(
    "--handoff-timeout",
    type=Seconds(0, min_open=True),
    metavar="SECONDS",
    default=5.0,
    show_default=True,
    help="Until a client must have sent its handoff.",
)
@_serving
def serve(
    *, source: str | None, source_for: str | None, path: str | None, metrics: Any, on_term: str, **options: Any
) -> int:
    """Serve the memory of other processes: microVMs (Firecracker's handoff), and our own clients.

    SOURCE is a path or a URL (http, s3, gs, az), of which all clients see the same.

    \b
    aiouffd serve snapshot.mem --socket /run/uffd.sock
    aiouffd serve https://host/snapshot.mem --socket /run/uffd.sock --background 200M
    aiouffd serve --source-for '/snapshots/{name}.mem' --socket /run/uffd.sock
    """  # noqa: D301 - a backspace is click's mark for lines that are kept
    if (source is None) == (source_for is None):
        raise click.UsageError("either SOURCE or --source-for says what the clients see")
    if options["record"] and options["replay"]:
        raise click.UsageError("either --record or --replay: what a replay brings is not seen to be touched")
    try:
        from aiouffd.cli import serving  # noqa: PLC0415 - needs an extra
    except ImportError as error:
        raise click.ClickException(f"{error}. Serving needs an extra: pip install 'aiouffd[serve]'") from error
    return serving.serve(source, source_for, path, metrics=metrics, fill=on_term == "fill", **options)


@group.command("lazy-pages")
@click.option(
    "-D",
    "--images-dir",
    "images",
    required=True,
    type=click.Path(exists=True, file_okay=False),
    help="Directory of the images.",
)
@click.option(
    "-W",
    "--work-dir",
    "work",
    type=click.Path(exists=True, file_okay=False),
    help="Where `criu restore` looks for the socket, if elsewhere.",
)
@click.option("--page-server", metavar="ADDRESS", help="Fetch lazy pages from `criu dump --lazy-pages` there.")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the page server.")
@click.option(
    "--criu",
    type=click.Choice(["4.1", "4.2"]),
    default="4.1",
    show_default=True,
    help="Version of the CRIU that dumps: up to 4.1, or from 4.2 on; its page server does not tell.",
)
@click.option(
    "--background/--no-background",
    default=True,
    show_default=True,
    help="Bring all pages unasked, and end when all are there.",
)
@click.option("--readahead", type=Size(), default="2M", show_default=True, help="Largest window; 0: page by page.")
def lazy_pages(*, page_server: str | None, port: int | None, criu: str, **options: Any) -> int:
    """Serve `criu restore --lazy-pages`, in place of `criu lazy-pages`."""
    if (page_server is None) != (port is None):
        raise click.UsageError("--page-server and --port belong together")
    try:
        from aiouffd.cli import serving  # noqa: PLC0415 - needs an extra
    except ImportError as error:
        raise click.ClickException(f"{error}. Serving needs an extra: pip install 'aiouffd[serve]'") from error
    server = (page_server, port) if page_server is not None and port is not None else None
    return serving.lazy_pages(page_server=server, criu=criu, **options)


@group.command()
def doctor() -> int:
    """Tell what this kernel and this user can do, and what to change if that is too little."""
    from aiouffd.cli.doctor import examine  # noqa: PLC0415 - not needed elsewhere

    report = examine()
    for line in report.lines():
        click.echo(line)
    return 0 if report.ok else 1
