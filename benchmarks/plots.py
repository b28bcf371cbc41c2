"""Pictures: how latencies are distributed, what a window brings, what more touchers bring. `--plots DIR`."""

from __future__ import annotations

import functools
import statistics
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

mpl.use("Agg")  # files only: no display is asked for

from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

from benchmarks.contestants import PAGE, c_poll, c_spin, monitored, warm
from benchmarks.native import touch
from benchmarks.row import MIB, shuffled
from benchmarks.rows import Far, page_by_page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.row import Serve

COLOURS = {"aiouffd": "#c1272d", "C poll": "#0000a7", "C spin": "#008176", "ideal": "#777777"}
WINDOWS = [0, 16 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20]
TOUCHERS = [1, 2, 4, 8, 16, 32, 64]
LATENCY = 0.005  # of the source that is far away


def draw(directory: Path, *, quick: bool) -> Iterator[Path]:
    """Measure and draw; yield each picture's path when it is there."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Axes, bool], None]] = {
        "latency": latencies,
        "window": windows,
        "touchers": touchers,
    }
    for name, picture in pictures.items():
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        picture(axes, quick)
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        yield path


def latencies(axes: Axes, quick: bool) -> None:  # noqa: FBT001 - called through a table
    """Draw which share of single touches has waited for how long."""
    size, rounds = (4 * MIB, 1) if quick else (32 * MIB, 5)
    handlers: dict[str, Serve] = {"C poll": c_poll, "C spin": c_spin, "aiouffd": page_by_page}
    waits: dict[str, list[np.ndarray]] = {name: [] for name in handlers}
    pages = shuffled(size)
    for _ in range(rounds):
        for name, serve in handlers.items():
            warm(size)
            waited = np.zeros(len(pages), np.uint32)
            with serve(size) as arena:
                touch(arena.address, pages, latencies=waited)
            waits[name].append(waited)
    for name, parts in waits.items():
        ordered = np.sort(np.concatenate(parts)) / 1e3
        behind = 1 - np.arange(len(ordered)) / len(ordered)  # the share that waited at least so long
        p50, p99 = np.quantile(ordered, [0.5, 0.99])
        axes.plot(ordered, behind, color=COLOURS[name], label=f"{name}: p50 {p50:.0f} us, p99 {p99:.0f} us")
    axes.set(xscale="log", yscale="log", xlabel="wait for a page, us", ylabel="share of touches that waited longer")
    axes.set_xlim(1, None)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share * 100:g} %")
    axes.set_title(f"Random 4 KiB touches, one toucher, {rounds} x {len(pages)} pages")
    axes.legend(frameon=False)


def windows(axes: Axes, quick: bool) -> None:  # noqa: FBT001
    """Draw what a page costs a toucher that moves in order, by the largest window that a fault may bring along."""
    size, rounds = (8 * MIB, 1) if quick else (64 * MIB, 5)
    pages = np.arange(size // PAGE, dtype=np.uint32)

    def cost(serve: Serve) -> float:
        warm(size)
        with serve(size) as arena:
            return touch(arena.address, pages) / len(pages) * 1e6

    figures: dict[int, list[float]] = {window: [] for window in WINDOWS}
    peer = []
    for _ in range(rounds):
        for window, costs in figures.items():
            costs.append(cost(functools.partial(monitored, readahead=window)))
        peer.append(cost(c_poll))
    medians = [statistics.median(costs) for costs in figures.values()]
    places = range(len(WINDOWS))
    axes.plot(places, medians, "o-", color=COLOURS["aiouffd"], label="aiouffd")
    for place, median in zip(places, medians, strict=True):
        axes.annotate(f"{median:.1f}", (place, median), (0, 8), textcoords="offset points", ha="center")
    level = statistics.median(peer)
    axes.axhline(level, color=COLOURS["C poll"], linestyle="--", label=f"C poll, page by page: {level:.1f}")
    names = ["page by page", *(f"{w >> 10} KiB" if w < MIB else f"{w >> 20} MiB" for w in WINDOWS[1:])]
    axes.set_xticks(places, names)
    axes.set(yscale="log", xlabel="readahead", ylabel="us a page", ylim=(1, None))
    axes.set_yticks([1, 2, 5, 10, 20, 50])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{size // MIB} MiB in order, one toucher, source in memory")
    axes.legend(frameon=False)


def touchers(axes: Axes, quick: bool) -> None:  # noqa: FBT001
    """Draw how much sooner the same pages are there when more threads touch them."""
    size, rounds = (4 * MIB, 1) if quick else (32 * MIB, 5)
    pages = shuffled(size)

    def far(size: int) -> Iterator[float]:
        for count in TOUCHERS:
            share = pages[: max(64 if quick else 256, 32 * count)]
            with monitored(size, Far(size, LATENCY), readahead=0) as arena:
                yield touch(arena.address, share, count) / len(share)

    def near(serve: Serve) -> Iterator[float]:
        for count in TOUCHERS:
            warm(size)
            with serve(size) as arena:
                yield touch(arena.address, pages, count) / len(pages)

    lines: dict[str, tuple[Callable[[], Iterator[float]], str, str]] = {
        f"aiouffd, source {LATENCY * 1e3:.0f} ms away": (lambda: far(size), COLOURS["aiouffd"], "s-"),
        "aiouffd, source in memory": (lambda: near(page_by_page), COLOURS["aiouffd"], "o--"),
        "C poll, source in memory": (lambda: near(c_poll), COLOURS["C poll"], "o--"),
    }
    seconds: dict[str, list[list[float]]] = {name: [] for name in lines}
    for _ in range(rounds):
        for name, (run, _, _) in lines.items():
            seconds[name].append(list(run()))
    axes.plot(TOUCHERS, TOUCHERS, ":", color=COLOURS["ideal"], label="as many times as there are touchers")
    for name, (_, colour, style) in lines.items():
        speedups = [[once[0] / later for later in once] for once in seconds[name]]
        medians = [statistics.median(column) for column in zip(*speedups, strict=True)]
        alone = statistics.median(once[0] for once in seconds[name]) * 1e6
        axes.plot(TOUCHERS, medians, style, color=colour, label=f"{name} (one toucher: {alone:,.0f} us a page)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xticks(TOUCHERS)
    axes.set(xlabel="touchers", ylabel="speed-up against one toucher")
    axes.set_title("Random 4 KiB touches, page by page")
    axes.legend(frameon=False)
