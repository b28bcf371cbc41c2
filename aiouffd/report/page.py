"""The figures of runs as one HTML file, which needs no other and no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

import attrs

from aiouffd.kernel.residency import bar
from aiouffd.report.advice import advise, advise_together
from aiouffd.report.charts import bars, film
from aiouffd.report.run import waited_ns
from aiouffd.report.words import duration, percent, several, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from aiouffd.report.advice import Advice
    from aiouffd.report.run import Run

__all__ = ["page"]

_CAUSES: Final = ("fault", "readahead", "prefetch", "replay", "background")
_QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)
_MOST: Final = 100  # runs on one page

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #fff; --line: #d1d9e0; --box: #f6f8fa;
  --good: #1a7f37; --hint: #9a6700; --trouble: #cf222e;
  --c0: #1f77b4; --c1: #8fc3e8; --c2: #2ca02c; --c3: #9467bd; --c4: #e08a1e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #3d444d;
  --box: #151b23; --good: #3fb950; --hint: #d29922; --trouble: #f85149;
  --c0: #4493d8; --c1: #2b5f8f; --c2: #3fb950; --c3: #ab7df8; --c4: #e08a1e; } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 72rem; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem }
h2 { font-size: 1.2rem; border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 2rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem } .soft, figcaption, .x, .y { color: var(--soft); font-size: .87rem }
ul.advice { list-style: none; padding: 0 }
ul.advice li { border-left: 4px solid var(--kind); padding: .4rem .8rem; margin: .5rem 0; background: var(--box) }
.good { --kind: var(--good) } .hint { --kind: var(--hint) } .trouble { --kind: var(--trouble) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0 }
.tiles div { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem }
.tiles b { display: block; font-size: 1.15rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 2rem }
figure { margin: 1rem 0; min-width: 0 } .plot { display: grid; grid-template-columns: minmax(3.5rem, max-content) 1fr;
  gap: 0 .4rem } .y { display: flex; flex-direction: column; justify-content: space-between; text-align: right }
.plot svg, .plot img { width: 100%; height: 9rem; display: block; background: var(--box);
  border: 1px solid var(--line); image-rendering: pixelated }
.x { grid-column: 2; display: flex; justify-content: space-between }
.mark { stroke: var(--trouble); stroke-width: 2px; vector-effect: non-scaling-stroke }
.c0 { fill: var(--c0) } .c1 { fill: var(--c1) } .c2 { fill: var(--c2) } .c3 { fill: var(--c3) } .c4 { fill: var(--c4) }
.key { display: inline-block; margin-right: 1em } .key svg { width: .8em; height: .8em; display: inline-block }
table { border-collapse: collapse } td, th { padding: .15rem 1rem .15rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line) } td.n { text-align: right; white-space: nowrap }
"""


def page(runs: Sequence[Run]) -> str:
    """Return the HTML of some runs, in this order; of more than a hundred, those with the most faults."""
    shown = list(runs)
    if len(shown) > _MOST:
        least = sorted((run.statistics.faults for run in runs), reverse=True)[_MOST - 1]
        shown = [run for run in runs if run.statistics.faults >= least][:_MOST]
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<link rel="icon" href="data:,"><title>aiouffd: report</title><style>{_STYLE}</style>',
        "<h1>aiouffd: report</h1>",
        *_advice(advise_together(runs)),
    ]
    if len(runs) != 1:
        parts.append(f"<p>{len(runs):,} runs{f', of which {_MOST} are shown' if len(runs) > len(shown) else ''}.</p>")
    for run in shown:
        parts += _run(run)
    return "\n".join(parts) + "\n"


def _run(run: Run) -> Iterator[str]:
    facts = run.facts
    yield f"<article><h2>{escape(facts.source)}</h2>"
    yield f'<p class="soft">{escape(f"{facts.engine}; {facts.began}; {run.ended}; {facts.host}")}'
    yield f"<br><code>{escape(facts.program)}</code></p>"
    yield from _advice(advise(run))
    yield from _tiles(run)
    yield '<div class="charts">'
    yield _faults(run)
    yield _came(run)
    yield _latency(run)
    if run.film:
        yield _residency(run)
    yield "</div>"
    yield from _source(run)
    yield from _counts(run)
    yield "</article>"


def _advice(advice: Iterable[Advice]) -> Iterator[str]:
    items = "".join(f'<li class="{one.kind}">{escape(one.text)}</li>' for one in advice)
    if items:
        yield f'<ul class="advice">{items}</ul>'


def _tiles(run: Run) -> Iterator[str]:
    seen = run.statistics
    tiles = {
        "took": duration(run.seconds),
        "faults": f"{seen.faults:,}",
        "the faults took together": f"about {duration(waited_ns(seen) / 1e9)}",
        "present at the end": f"{size(run.resident)} ({percent(run.resident, run.facts.size)})",
        "region": size(run.facts.size),
        "from the source": size(seen.bytes_fetched),
    }
    shown = "".join(f'<div><b>{value}</b><span class="soft">{name}</span></div>' for name, value in tiles.items())
    yield f'<div class="tiles">{shown}</div>'


# Pictures


def _faults(run: Run) -> str:
    counts = run.column("faults")
    times = [f"{duration(index * run.width)}: {several(count, 'fault')}" for index, count in enumerate(counts)]
    marks = [
        (index + 0.5, f"{duration(index * run.width)}: {what}")
        for name, what in (("restarts", "the worker died and was replaced"), ("source_retries", "reads failed"))
        for index, count in enumerate(run.column(name))
        if count
    ]
    picture = bars([[count] for count in counts], times, "faults over time", marks)
    said = "Faults over time, a second" + ("; red: a worker died, or reads failed" if marks else "")
    return _figure(said, picture, (f"{max(counts, default=0) / run.width:,.0f}", "0"), _times(run))


def _came(run: Run) -> str:
    page_size = run.facts.page_size
    columns = [run.column(f"pages_{cause}") for cause in _CAUSES]
    stacks = [[count * page_size for count in row] for row in zip(*columns, strict=True)]
    times = [f"{duration(index * run.width)}: {size(sum(stack))}" for index, stack in enumerate(stacks)]
    most = max(map(sum, stacks), default=0) / run.width
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 1 1"><rect class="c{number}" width="1" height="1"/></svg> {cause}</span>'
        for number, cause in enumerate(_CAUSES)
        if any(columns[number])
    )
    picture = bars(stacks, times, "bytes that came over time, by what brought them")
    return _figure(f"What came, a second, and why: {keys}", picture, (size(most), "0"), _times(run))


def _latency(run: Run) -> str:
    seen = run.statistics
    there = [bits for bits, count in enumerate(seen.latency) if count] or [10]
    span = range(there[0], there[-1] + 1)
    titles = [f"{_bound(bits - 1)} to {_bound(bits)}: {several(seen.latency[bits], 'fault')}" for bits in span]
    picture = bars([[seen.latency[bits]] for bits in span], titles, "how long faults took")
    words = ", ".join(f"{100 * quantile:g} % within {_bound_of(run, quantile)}" for quantile in _QUANTILES)
    said = f"How long faults took, from being read to being resolved: {words}"
    return _figure(said, picture, (f"{max(seen.latency):,}", "0"), (_bound(there[0] - 1), _bound(there[-1])))


def _residency(run: Run) -> str:
    last = run.film[-1][1]
    said = f"{percent(run.resident, run.facts.size)} of the region was present at the end"
    picture = film(run.film, run.seconds, f"what was present over time; {said}")
    shown = _figure(
        "What was present, by offset over time", picture, ("0", size(run.facts.size)), ("0", duration(run.seconds))
    )
    end = bar([share / 100 for share in last], said)
    return f"<div>{shown}<figure><figcaption>{said}, by offset:</figcaption>{end}</figure></div>"


def _figure(caption: str, picture: str, y: tuple[str, str], x: tuple[str, str]) -> str:
    """Return a picture with its axes. All is HTML already."""
    sides = [
        f'<div class="{axis}"><span>{low}</span><span>{high}</span></div>'
        for axis, (low, high) in zip("yx", (y, x), strict=True)
    ]
    return f'<figure><figcaption>{caption}</figcaption><div class="plot">{sides[0]}{picture}{sides[1]}</div></figure>'


def _times(run: Run) -> tuple[str, str]:
    return "0", duration(max(len(run.rows), 1) * run.width)


def _bound(bits: int) -> str:
    return duration((1 << max(bits, 0)) / 1e9)


def _bound_of(run: Run, quantile: float) -> str:
    return duration(run.statistics.latency_ns(quantile) / 1e9)


# Tables


def _source(run: Run) -> Iterator[str]:
    seen = run.statistics
    calls = "calls of the handler" if run.facts.is_handler else "reads that were waited for"
    rows = {
        calls: f"{seen.source_reads:,}",
        "each on average": duration(seen.source_ns / seen.source_reads / 1e9) if seen.source_reads else "",
        "bytes": size(seen.bytes_fetched),
        "bytes a second": size(seen.bytes_fetched / run.seconds) if run.seconds else "",
        "further tries": f"{seen.source_retries:,}",
        "failed for good": f"{seen.source_errors + seen.handler_errors:,}",
        "outages": ", ".join(f"{duration(start)} to {duration(end)}" for start, end in run.outages()[:10]),
        **{f"cache: {name}": f"{count:,}" for name, count in run.cache.items()},
    }
    yield f"<h3>{'Handler' if run.facts.is_handler else 'Source'}</h3>{_table(rows)}"
    if run.errors:
        yield f"<h3>Errors</h3><ul>{''.join(f'<li>{escape(error)}</li>' for error in run.errors)}</ul>"


def _counts(run: Run) -> Iterator[str]:
    counts = {name: f"{count:,}" for name, count in attrs.asdict(run.statistics).items() if name != "latency" and count}
    yield f"<details><summary>All counts (aiouffd.Statistics)</summary>{_table(counts)}</details>"


def _table(rows: dict[str, str]) -> str:
    cells = (f'<tr><td>{escape(name)}<td class="n">{escape(value)}' for name, value in rows.items() if value)
    return f"<table>{''.join(cells)}</table>"
