"""Runs with known figures, for the tests of reports."""

from __future__ import annotations

from typing import Any

import attrs
from hypothesis import strategies as st

from aiouffd.engine.statistics import Statistics
from aiouffd.report.run import COLUMNS, NOTHING, Facts, Run

__all__ = ["MIB", "PAGE", "anything", "run_of"]

MIB, PAGE = 1 << 20, 4096
_FACTS = Facts("Far()", "Pager()", "python program.py", "Linux 6.1", "2026-01-01", 64 * MIB, PAGE, 2 * MIB)


def run_of(rows: dict[str, list[int]] | None = None, **figures: Any) -> Run:
    """Return a run.

    Args:
        rows: columns of the timeline, which are 0.1 s wide.
        **figures: of its statistics, its facts, or itself; latency: counts by bits.
    """
    own = {field.name for field in attrs.fields(Run)}
    facts = {name: figures.pop(name) for name in list(figures) if hasattr(_FACTS, name)}
    itself = {name: figures.pop(name) for name in list(figures) if name in own}
    counted = figures.pop("latency", {})
    latency = tuple(counted.get(bits, 0) for bits in range(48))
    columns = [(rows or {}).get(name, []) for name in COLUMNS]
    length = max(map(len, columns))
    table = [[column[index] if column else 0 for column in columns] for index in range(length)]
    given: dict[str, Any] = {
        "ended": "the block was left",
        "seconds": 10.0,
        "film": [],
        "resident": 0,
        "stretches": 0,
    } | itself
    statistics = attrs.evolve(NOTHING, latency=latency, **figures)
    return Run(attrs.evolve(_FACTS, **facts), statistics=statistics, width=0.1, rows=table, **given)


_COUNTED = [field.name for field in attrs.fields(Statistics) if field.name != "latency"]
_NUMBERS = st.integers(0, 1 << 40) | st.sampled_from([0, 1, (1 << 64) - 1])


def _made(figures: dict[str, Any]) -> Run:
    return run_of(**figures)


def anything() -> st.SearchStrategy[Run]:
    """Return a strategy of runs with any figures that can be in a file."""
    text = st.text(max_size=8) | st.just("<script>&\"'")
    figures: dict[str, Any] = {
        **dict.fromkeys([*_COUNTED, "size", "readahead", "resident", "stretches"], _NUMBERS),
        **dict.fromkeys(["is_handler", "records", "brings_ahead", "caches"], st.booleans()),
        **dict.fromkeys(["source", "engine", "program", "host", "began", "ended"], text),
        "page_size": st.integers(1, (1 << 64) - 1),
        "seconds": st.floats(0, 1e18),
        "latency": st.dictionaries(st.integers(0, 47), _NUMBERS),
        "cache": st.dictionaries(st.sampled_from(["hits", "misses", "evictions", "<b>"]), _NUMBERS),
        "errors": st.lists(text, max_size=2),
        "film": st.lists(st.tuples(st.floats(0, 1e11), st.lists(st.integers(0, 100), max_size=3)), max_size=3).map(
            sorted
        ),
        "rows": st.dictionaries(st.sampled_from(COLUMNS), st.lists(_NUMBERS, min_size=3, max_size=3)),
    }
    return st.fixed_dictionaries({}, optional=figures).map(_made)
