"""`report.advice`: what figures mean, each pattern by a run that shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from reported import MIB, PAGE, anything, run_of

from aiouffd.report.advice import advise, advise_together

if TYPE_CHECKING:
    from aiouffd.report.run import Run

MS = 1_000_000
FAR: dict[str, Any] = {
    "source_reads": 100,
    "source_ns": 100 * 38 * MS,
    "latency": {26: 98, 28: 2},
    "faults": 100,
    "pages_fault": 100,
}


NOTHING = "good: The figures show nothing to be improved."
CASES: list[tuple[dict[str, Any], str]] = [
    ({}, "good: Nothing was touched."),
    ({"faults": 3, "pages_fault": 3}, NOTHING),
    (
        {"faults": 110, "joined": 10, "sequential": 92, "pages_fault": 100, "pages_readahead": 25500},
        """good: 92 % of the faults were sequential: readahead, in windows of 2.0 MiB at most, brought 1.0 MiB for
        each.""",
    ),
    (
        {"faults": 100, "pages_fault": 100, "pages_readahead": 3000},
        """hint: Only 0 % of the faults were sequential, and readahead brought 31 pages where one was asked for. If
        the others are not needed, readahead=0 fetches 400.0 KiB instead of 12.1 MiB.""",
    ),
    # What sequential faults bring was not in vain.
    ({"faults": 100, "pages_fault": 100, "pages_readahead": 3000, "sequential": 3}, NOTHING),
    (
        {"faults": 640, "pages_fault": 640, "readahead": 0, "stretches": 20},
        """hint: readahead=0: each of 640 pages was a fault of its own, and they lie in stretches of 32 on average.
        With the default, one fault brings up to 2 MiB of a stretch.""",
    ),
    ({"faults": 640, "pages_fault": 640, "readahead": 0, "stretches": 500}, NOTHING),
    (
        {"faults": 640, "pages_fault": 640, "readahead": 0, "stretches": 1, "records": True},
        "good: record= without readahead serves page by page: the times are not those of a run without it.",
    ),
    (
        {"source_reads": 9, "bytes_fetched": 4 * MIB, "resident": 2 * MIB, "forks": 1, "pages_fault": 512},
        """hint: Each page was fetched 2.0 times: 4.0 MiB for 2.0 MiB. Once a child was forked, and each fetches for
        itself. With cache= it comes from this host the second time.""",
    ),
    # What was emptied was not fetched twice.
    ({"source_reads": 9, "bytes_fetched": 2 * MIB, "resident": PAGE, "removes": 5, "pages_fault": 512}, NOTHING),
    (
        {
            "pages_fault": 32768,
            "pages_evicted": 16384,
            "resident": 64 * MIB,
            "source_reads": 5,
            "bytes_fetched": 128 * MIB,
        },
        """hint: Each page of the region came 2.0 times on average, with 16,384 pages dropped: a larger
        max_resident keeps what is touched again.""",
    ),
    (
        {"cache": {"hits": 97, "misses": 3}, "caches": True, "pages_fault": 1},
        "good: The cache had 97 % of the chunks that were needed.",
    ),
    (
        {"cache": {"hits": 1, "misses": 3, "evictions": 2}, "caches": True, "pages_fault": 1},
        """hint: The cache had 25 % of the chunks that were needed, and evicted 2 segments: a larger max_bytes keeps
        more.""",
    ),
    (
        FAR | {"is_handler": True},
        """hint: A fault took 67 ms (median; 1 % of them 268 ms), and a call of the handler 38 ms on average; all
        faults took 5.3 s together. So prefetch() what comes next, or record= the order once and replay= it.""",
    ),
    (
        {"latency": {27: 100}, "faults": 100, "pages_fault": 100},
        "hint: 1 % of the faults took 134 ms, though no read had to be waited for: the host was busy.",
    ),
    (
        {"faults": 10**6, "pages_fault": 10**6, "latency": {10: 10**6}},
        """hint: All bytes were at hand, and 1,000,000 faults went through the pager: engine=InThread() places them
        in the touching thread, if no system call touches the region.""",
    ),
    (
        {"restarts": 2, "pages_poisoned": 1, "pages_fault": 3, "source_errors": 1},
        """trouble: The pager's worker died 2 times and was replaced. No fault was lost; standard error says how it
        died. trouble: 1 page could not be had, since the source failed: a touch is SIGBUS. on_error="retry" has
        threads wait instead.""",
    ),
    ({"source_errors": 2, "pages_prefetch": 1}, "trouble: 2 reads or calls failed for good."),
]


@pytest.mark.parametrize(("figures", "expected"), CASES)
def test_each_pattern(figures: dict[str, Any], expected: str) -> None:
    """Is told with its figures, and nothing else is."""
    assert " ".join(f"{one.kind}: {one.text}" for one in advise(run_of(**figures))) == " ".join(expected.split())


@pytest.mark.parametrize(
    ("figures", "better"),
    [
        ({"resident": 60 * MIB}, "94 % of the region was needed: background=True brings it ahead."),
        ({"brings_ahead": True}, "what was brought ahead was not what was touched: record= again, or prefetch()"),
        ({}, "prefetch() what comes next, or record= the order once and replay= it."),
    ],
)
def test_what_to_do_about_a_far_source(figures: dict[str, Any], better: str) -> None:
    """It depends on how much was needed, and on what was done already."""
    (one,) = [one for one in advise(run_of(**FAR | figures)) if "a read of the source 38 ms" in one.text]
    assert better in one.text
    assert not any("a read of the source" in one.text for one in advise(run_of(**FAR | figures, seconds=1000.0)))


def test_outages_are_told_with_their_times() -> None:
    """The first three, before what could be better."""
    retries = {"source_retries": ([5] + [0] * 29) * 4}
    first, *_ = advise(run_of(retries, **FAR | {"source_retries": 20, "source_reads": 200}))
    assert first.kind == "trouble"
    assert first.text == (
        "10 % of the reads were further tries after a failure (20 of 200, at 0 ns to 100 ms; 3.0 s to 3.1 s; 6.0 s to"
        " 6.1 s)."
    )


def test_several_monitors_of_one_source() -> None:
    """A cache would have fetched once."""
    one = run_of(source_reads=1, bytes_fetched=MIB)
    assert advise_together([one]) == []
    (advice,) = advise_together([one, one, run_of(source_reads=1, caches=True), run_of(faults=1)])
    assert advice.text.startswith("2 Monitors fetched 2.0 MiB from Far(), each for itself: with cache= ")


@given(anything())
def test_it_never_fails(run: Run) -> None:
    """Whatever the figures are: there is advice, and trouble comes first."""
    found = advise(run)
    assert found
    assert all(one.text for one in found)
    kinds = ["trouble", "hint", "good"]
    assert [kinds.index(one.kind) for one in found] == sorted(kinds.index(one.kind) for one in found)
    advise_together([run, run])
