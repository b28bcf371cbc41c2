"""What a run has found: a table in Markdown, figures in JSON, and one HTML page with the table and the pictures."""

from __future__ import annotations

import base64
import json
import math
import platform
import statistics
import time
from html import escape
from typing import TYPE_CHECKING, Any

import attrs

from benchmarks import knobs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

HEAD = ("what", "configured", "aiouffd", "beside", "ratio (quartiles)", "bar")
LEAST, MOST, WIDTH = 0.01, 10.0, 240  # ratios at the ends of a strip, and its pixels

STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #222 }
table { border-collapse: collapse } th, td { padding: .2em .6em; border-bottom: 1px solid #ddd; text-align: left }
tr.missed td:nth-child(6) { color: #c1272d; font-weight: bold } img { max-width: 100% }
"""


@attrs.frozen
class Line:
    """One line of the table: ours beside one peer.

    Attributes:
        cells: the words below HEAD.
        ratio: its quartiles: the first, the median, the third.
        bar: the limit, if there is one.
        holds: whether the median is within the limit; None without one.
    """

    cells: tuple[str, ...]
    ratio: tuple[float, float, float]
    bar: float | None
    holds: bool | None


def lines(results: Sequence[dict[str, Any]]) -> Iterator[Line]:
    """Yield the lines of the table."""
    for result in results:
        for name, ratio in result["ratios"].items():
            ours, theirs = (statistics.median(result["figures"][each]) for each in ("aiouffd", name))
            low, high = ratio["quartiles"]
            held = "" if ratio["bar"] is None else f"{ratio['bar']:.2f} {'holds' if ratio['holds'] else 'missed'}"
            cells = (
                *(result["title"], result["setup"], f"{ours:.2f} {result['unit']}", f"{name}: {theirs:.2f}"),
                *(f"{ratio['median']:.2f} ({low:.2f}-{high:.2f})", held),
            )
            yield Line(cells, (low, ratio["median"], high), ratio["bar"], ratio["holds"])


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    for cells in (HEAD, ("---",) * len(HEAD), *(line.cells for line in lines(results))):
        yield f"| {' | '.join(cells)} |".replace("missed |", "**missed** |")


def machine(*, kept: bool, quick: bool) -> dict[str, Any]:
    """Return what the figures depend on.

    Args:
        kept: free memory did not go back to the host.
        quick: the sizes were small.
    """
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "halt_poll_ns": knobs.regime(),
        "free_memory_kept": kept,
        "busy": bool(knobs.BUSY),
        "quick": quick,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def keep(results: Sequence[dict[str, Any]], machine: dict[str, Any], directory: Path) -> None:
    """Write the figures of all rounds."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{machine['time'].replace(':', '')}.json"
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


def remarks(results: Sequence[dict[str, Any]], machine: dict[str, Any]) -> Iterator[str]:
    """Yield what a reader must know of the figures."""
    for result in results:
        if result["remark"]:
            yield f"{result['row']}: {result['remark']}."
    memory = "" if machine["free_memory_kept"] else ", free memory goes back to the host"
    busy = ", each processor kept busy" if machine["busy"] else ""
    quick = ", small sizes: no figures to quote" if machine["quick"] else ""
    where = f"Linux {machine['kernel']}, Python {machine['python']}, halt poll {machine['halt_poll_ns']}"
    yield where + memory + busy + quick


def strip(line: Line) -> str:
    """Return an SVG: the quartiles of a ratio and its bar, on a logarithmic scale with 1 in grey."""

    def at(ratio: float) -> float:
        share = math.log(min(max(ratio, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
        return round(share * (WIDTH - 4) + 2, 1)

    low, median, high = map(at, line.ratio)
    colour = "#c1272d" if line.holds is False else "#008176"
    marks = [(1.0, "#bbb"), *([(line.bar, "#222")] if line.bar is not None else [])]
    drawn = [f'<path d="M{at(where)} 0V16" stroke="{shade}"/>' for where, shade in marks]
    drawn.append(f'<path d="M{low} 8H{high}" stroke="{colour}" stroke-width="3"/>')
    drawn.append(f'<circle cx="{median}" cy="8" r="4" fill="{colour}"/>')
    return f'<svg width="{WIDTH}" height="16">{"".join(drawn)}</svg>'


def page(results: Sequence[dict[str, Any]], machine: dict[str, Any], pictures: Sequence[Path]) -> str:
    """Return an HTML page that needs no other file."""
    parts = [f'<!doctype html><meta charset="utf-8"><title>aiouffd: benchmarks</title><style>{STYLE}</style>']
    parts.append(f"<h1>aiouffd: benchmarks</h1><p>{escape(machine['time'])}")
    parts += [f"<p>{escape(remark)}" for remark in remarks(results, machine)]
    head = "".join(f"<th>{name}" for name in (*HEAD, f"{LEAST} to {MOST:g}; grey: 1, black: the bar"))
    parts.append(f"<table><tr>{head}")
    for line in lines(results):
        cells = "".join(f"<td>{escape(cell)}" for cell in line.cells)
        parts.append(f'<tr class="{"missed" if line.holds is False else ""}">{cells}<td>{strip(line)}')
    parts.append("</table>")
    for result in results:
        for name, why in result["left_out"].items():
            what = result["title"] if name == "aiouffd" else f"{result['title']}, {name}"
            parts.append(f"<p>Left out: {escape(what)}: {escape(why)}")
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">')
    return "\n".join(parts) + "\n"
