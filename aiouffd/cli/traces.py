"""`aiouffd trace`: look at recordings of first touches, and make one of several."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aiouffd.cli import parameters
from aiouffd.engine.ahead.keeping import save_with_pages
from aiouffd.engine.ahead.merging import merged
from aiouffd.engine.ahead.trace import Trace
from aiouffd.report.heat import heat_map
from aiouffd.report.words import percent, several

if TYPE_CHECKING:
    from aiouffd.engine.ahead.merging import Order

__all__ = ["command"]

_FILE = click.Path(exists=True, dir_okay=False)
_KINDS = {
    0: "not known",
    1: "by its size and samples of its content",
    2: "by its size and the version that its server names",
    3: "by its size",
}


@click.group("trace")
def command() -> None:
    """Look at recordings of first touches (`--record`, `record=`), and make one of several.

    \b
    aiouffd trace show boot.trace --svg boot.svg
    aiouffd trace merge monday.trace tuesday.trace -o boot.trace --by frequency
    """  # noqa: D301 - a backspace is click's mark for lines that are kept


@command.command()
@click.argument("file", type=_FILE)
@click.option("--svg", type=click.Path(dir_okay=False), help="Write a picture there: offsets in order of the touches.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(file: str, svg: str | None, *, as_json: bool) -> None:
    """Print what FILE has recorded."""
    trace = Trace.load(file)
    if svg is not None:
        name = Path(file).name
        Path(svg).write_text(heat_map(trace.offsets, trace.page_size, trace.size, name), encoding="utf-8")
    facts = _facts(trace)
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:<12} {value:,}" if isinstance(value, int) else f"{name:<12} {value}")


def _facts(trace: Trace) -> dict[str, Any]:
    page, count = trace.page_size, len(trace.offsets)
    there = set(trace.offsets)
    in_order = sum(after == before + page for before, after in pairwise(trace.offsets))
    return {
        "pages": count,
        "page_size": page,
        "bytes": count * page,
        "size": trace.size,
        "share": percent(count * page, trace.size),
        "ranges": count - sum(offset + page in there for offset in there),
        "in_order": percent(in_order, count),
        "came_along": percent(len(trace.along), count),
        "carried": 0 if trace.pages is None else len(trace.pages.offsets),
        "source": _KINDS.get(trace.source[0], "of a kind that this version does not know"),
    }


@command.command()
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="The recording to be written.")
@click.option(
    "--by",
    type=click.Choice(["union", "frequency", "last"]),
    default="union",
    show_default=True,
    help="What comes first: what any run touched early, what most runs touched, or what the last run touched.",
)
@click.option(
    "--at-least", type=click.IntRange(1), default=1, show_default=True, help="Only pages that so many touched."
)
@click.option("--limit", type=parameters.Size(), help="The most bytes of pages. [default: no limit]")
@click.option("--touched", is_flag=True, help="Only pages that were touched, and none that came along with others.")
@click.option("--pages", type=parameters.Size(), default="1G", show_default=True, help="Most bytes of pages; 0: none.")
def merge(
    *, files: tuple[str, ...], output: str, by: Order, at_least: int, limit: int | None, touched: bool, pages: int
) -> None:
    """Make one recording of FILES, the oldest first, of the same source. OUTPUT may be one of them.

    It carries the bytes of those of its pages that FILES carry, of the version of the source that the last one has.
    """
    named = [(file, Trace.load(file)) for file in files]
    trace = merged(named, by, at_least=at_least, most=limit, touched=touched)
    if not trace.offsets:
        raise click.ClickException("no page is left: use a smaller --at-least, or a larger --limit")
    carried = save_with_pages(trace, output, [trace for _, trace in named], pages)
    of_bytes = f", the bytes of {carried:,}" if carried else ""
    click.echo(f"{output}: {several(len(trace.offsets), 'page')} of {several(len(files), 'recording')}{of_bytes}")
