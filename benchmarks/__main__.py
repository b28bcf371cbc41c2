"""`python -m benchmarks`: run the rows beside their peers, in one run, interleaved; print the table, draw pictures.

Each round runs every contestant of a row once; a ratio is taken within a round, and the table gives the median of
the rounds' ratios with their quartiles.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import signal
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

import aiouffd
from benchmarks import knobs, report
from benchmarks.rows import rows

if TYPE_CHECKING:
    from benchmarks.row import Row

REGIMES = (0, 200_000)  # halt at once; poll for 200 us, as a host that is not shared can afford


def measure(row: Row, repeats: int) -> dict[str, Any]:
    """Run a row's contestants in turn, and compare."""
    say(f"{row.name}: {row.title} ...")
    for name, why in row.left_out.items():
        say(f"{row.name}: {name} is left out: {why}")
    figures: dict[str, list[float]] = {name: [] for name in row.contestants}
    for _ in range(row.repeats or repeats):
        for name, run in row.contestants.items():
            figures[name].append(run())
    result: dict[str, Any] = {"row": row.name, "title": row.title, "unit": row.unit, "figures": figures, "ratios": {}}
    result |= {"left_out": row.left_out, "remark": row.remark(), "setup": row.setup}
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


def say(message: str) -> None:
    """Tell how far it is."""
    print(message, file=sys.stderr, flush=True)


def run_rows(wanted: set[str] | None, repeats: int, *, quick: bool) -> list[dict[str, Any]]:
    """Run the rows of these names, None: all; a row that this machine cannot run has no figures, and says why."""
    results = []
    for row in rows(quick=quick):
        if wanted is not None:
            if row.name not in wanted:
                continue
            wanted = wanted - {row.name}
        if "aiouffd" in row.left_out:
            say(f"{row.name} is left out: {row.left_out['aiouffd']}")
            results.append(
                {"row": row.name, "title": row.title, "left_out": row.left_out, "ratios": {}, "remark": None}
            )
        else:
            results.append(measure(row, repeats))
        if wanted is not None and not wanted:
            break
    if wanted:
        raise ValueError(f"no such row: {', '.join(sorted(wanted))}")
    return results


def run_regimes(repeats: int, *, quick: bool) -> list[dict[str, Any]]:
    """Run one row in each regime of idle processors; an empty list where that cannot be changed."""
    why = knobs.unavailable()
    if why is not None:
        say(f"the regimes are left out: {why}")
        return []
    results = []
    for nanoseconds in REGIMES:
        with knobs.halt_poll(nanoseconds):
            (row,) = (row for row in rows(quick=quick) if row.name == "random-1")
            words = f"idle cores poll for {nanoseconds // 1000} us" if nanoseconds else "idle cores halt at once"
            # The bars are for cores that halt at once: where they poll, everybody is woken quickly.
            row = attrs.evolve(
                row,
                name=f"{row.name}-idle-{nanoseconds}",
                title=f"{row.title}, {words}",
                bars=() if nanoseconds else row.bars,
            )
            results.append(measure(row, repeats))
    return results


def terminated(number: int, _: object) -> None:
    """Leave by an exception, so that what is mounted, set or written is put back."""
    sys.exit(128 + number)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--rows", help="names, comma-separated; default: all")
    parser.add_argument("--repeats", type=int, default=9, help="rounds a row")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works; no figures to quote")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory of the JSON")
    parser.add_argument("--halt-poll", type=int, metavar="NS", help="guest_halt_poll_ns for this run (put back after)")
    parser.add_argument(
        "--idle-regimes", action="store_true", help="one row while idle cores halt at once, and while they poll"
    )
    parser.add_argument(
        "--busy", action="store_true", help="keep each processor busy with a spinning process meanwhile"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the table and the pictures into one page")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw latencies, windows and touchers as PNG there")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, terminated)
    # As pip does when it installs. Else each pager compiles the package where PYTHONDONTWRITEBYTECODE is set.
    compileall.compile_dir(Path(aiouffd.__file__).parent, quiet=1)
    everything = arguments.rows is None and not arguments.idle_regimes and arguments.plots is None
    results: list[dict[str, Any]] = []
    with (
        knobs.memory_kept() as kept,
        knobs.halt_poll(arguments.halt_poll),
        knobs.busy() if arguments.busy else contextlib.nullcontext(),
    ):
        if not kept:
            say("free memory may go back to the host meanwhile: figures vary more than they would")
        if everything or arguments.rows is not None:
            wanted = set(arguments.rows.split(",")) if arguments.rows else None
            try:
                results += run_rows(wanted, arguments.repeats, quick=arguments.quick)
            except ValueError as error:
                parser.error(str(error))
        if everything or arguments.idle_regimes:
            results += run_regimes(arguments.repeats, quick=arguments.quick)
        machine = report.machine(kept=kept, quick=arguments.quick)
        if results:
            report.keep(results, machine, arguments.output)
            print(*report.table(results), "", *report.remarks(results, machine), sep="\n")
        pictures = []
        if everything or arguments.plots is not None:
            from benchmarks.plots import draw  # noqa: PLC0415 - the rows need no matplotlib

            for path in draw(arguments.plots or arguments.output, quick=arguments.quick):
                print(path)
                pictures.append(path)
        if arguments.html is not None:
            arguments.html.write_text(report.page(results, machine, pictures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
