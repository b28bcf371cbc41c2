"""`python -m benchmarks`: run the rows beside their peers, in one run, interleaved; print the table.

Each round runs every contestant of a row once; a ratio is taken within a round, and the table gives the median of
the rounds' ratios with their quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row, rows

if TYPE_CHECKING:
    from collections.abc import Iterator

HALT_POLL = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")


@contextlib.contextmanager
def halt_poll(nanoseconds: int | None) -> Iterator[None]:
    """Have idle cores poll for so long before they halt; put back what was set, whatever happens."""
    if nanoseconds is None:
        yield
        return
    before = HALT_POLL.read_text()
    HALT_POLL.write_text(str(nanoseconds))
    try:
        yield
    finally:
        HALT_POLL.write_text(before)


def measure(row: Row, repeats: int) -> dict[str, Any]:
    """Run a row's contestants in turn, and compare."""
    figures: dict[str, list[float]] = {name: [] for name in row.contestants}
    for _ in range(row.repeats or repeats):
        for name, run in row.contestants.items():
            figures[name].append(run())
    result: dict[str, Any] = {"row": row.name, "title": row.title, "unit": row.unit, "figures": figures, "ratios": {}}
    bars = {bar.peer: bar for bar in row.bars}
    for name, values in figures.items():
        if name == "aiouffd":
            continue
        ratios = [ours / theirs for ours, theirs in zip(figures["aiouffd"], values, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        bar = bars.get(name)
        result["ratios"][name] = {
            "median": statistics.median(ratios),
            "quartiles": [quartiles[0], quartiles[2]],
            "bar": bar.limit if bar else None,
            "holds": bar.holds(statistics.median(ratios)) if bar else None,
        }
    return result


def table(results: list[dict[str, Any]]) -> list[str]:
    """Return the results as a Markdown table."""
    lines = ["| what | aiouffd | beside | ratio (quartiles) | bar |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        ours = statistics.median(result["figures"]["aiouffd"])
        for name, ratio in result["ratios"].items():
            theirs = statistics.median(result["figures"][name])
            low, high = ratio["quartiles"]
            bar = "" if ratio["bar"] is None else f"{ratio['bar']:.2f} {'holds' if ratio['holds'] else '**missed**'}"
            lines.append(
                f"| {result['title']} | {ours:.2f} {result['unit']} | {name}: {theirs:.2f} |"
                f" {ratio['median']:.2f} ({low:.2f}-{high:.2f}) | {bar} |"
            )
    return lines


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--rows", help="names, comma-separated; default: all")
    parser.add_argument("--repeats", type=int, default=9, help="rounds a row")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works; no figures to quote")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory of the JSON")
    parser.add_argument("--halt-poll", type=int, metavar="NS", help="guest_halt_poll_ns for this run (put back after)")
    arguments = parser.parse_args()
    wanted = set(arguments.rows.split(",")) if arguments.rows else None
    results = []
    with halt_poll(arguments.halt_poll):
        for row in rows(quick=arguments.quick):
            if wanted is not None and row.name not in wanted:
                continue
            print(f"{row.name}: {row.title} ...", file=sys.stderr, flush=True)
            results.append(measure(row, arguments.repeats))
    if not results:
        parser.error("no such row")
    regime = HALT_POLL.read_text().strip() if HALT_POLL.exists() else "unknown"
    machine = {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "halt_poll_ns": arguments.halt_poll if arguments.halt_poll is not None else regime,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = arguments.output / f"{machine['time'].replace(':', '')}.json"
    name.write_text(json.dumps({"machine": machine, "quick": arguments.quick, "results": results}, indent=1))
    print(
        *table(results),
        "",
        f"Linux {machine['kernel']}, Python {machine['python']}, halt poll {machine['halt_poll_ns']}",
        sep="\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
