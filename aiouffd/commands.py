"""The commands, on click. `aiouffd.cli` imports this where the extra is installed."""

from __future__ import annotations

import re
from typing import Any

import click

import aiouffd

__all__ = ["Size", "group"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.3
    """Bytes, with an optional unit: 65536, 64K, 1G, 1GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size: write for example 65536, 64K, 256M or 1G", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


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
        from aiouffd import demo as program  # noqa: PLC0415 - needs numpy and obstore
    except ImportError as error:
        raise click.ClickException(f"{error}. The demo needs an extra: pip install 'aiouffd[demo]'") from error
    return program.run(size=size, threads=threads, touches=touches, latency=latency_ms / 1000)


@group.command()
def doctor() -> int:
    """Tell what this kernel and this user can do, and what to change if that is too little."""
    from aiouffd.doctor import examine  # noqa: PLC0415 - not needed elsewhere

    report = examine()
    for line in report.lines():
        click.echo(line)
    return 0 if report.ok else 1
