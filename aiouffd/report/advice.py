"""What the figures of a run mean, in words: pure functions of them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs

from aiouffd.report.run import waited_ns
from aiouffd.report.words import duration, often, percent, several, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiouffd.report.run import Run

__all__ = ["Advice", "advise", "advise_together"]

Kind: TypeAlias = Literal["good", "hint", "trouble"]

_FEW: Final = 4  # faults, below which they show no pattern
_FAR: Final = 1e6  # nanoseconds that a read takes at least where the source is far


@attrs.frozen
class Advice:
    """A sentence or two.

    Attributes:
        kind: "good": as it should be; "hint": it could be better; "trouble": something failed.
        text: with the figures that it follows from.
    """

    kind: Kind
    text: str


def advise(run: Run) -> list[Advice]:
    """Return what the figures of a run mean, trouble first."""
    found = [*_troubles(run), *_order(run), *_fetches(run), *_waits(run)]
    if not found:
        nothing = not run.statistics.faults and not run.statistics.pages
        found = [Advice("good", "Nothing was touched." if nothing else "The figures show nothing to be improved.")]
    return sorted(found, key=lambda one: ("trouble", "hint", "good").index(one.kind))


def advise_together(runs: Sequence[Run]) -> list[Advice]:
    """Return what the figures of several runs mean together."""
    fetched: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        if run.statistics.source_reads and not run.facts.caches and not run.facts.is_handler:
            fetched[run.facts.source].append(run.statistics.bytes_fetched)
    return [
        Advice(
            "hint",
            f"{len(counts)} Monitors fetched {size(sum(counts))} from {source}, each for itself: with cache= what one"
            " of them has fetched is there for all, in later runs as well.",
        )
        for source, counts in fetched.items()
        if len(counts) > 1
    ]


def _troubles(run: Run) -> Iterator[Advice]:
    seen = run.statistics
    if seen.restarts:
        yield Advice(
            "trouble",
            f"The pager's worker died {often(seen.restarts)} and was replaced. No fault was lost; standard error says"
            " how it died.",
        )
    if seen.pages_poisoned:
        what = "handler" if run.facts.is_handler else "source"
        yield Advice(
            "trouble",
            f"{several(seen.pages_poisoned, 'page')} could not be had, since the {what} failed: a touch is SIGBUS."
            ' on_error="retry" has threads wait instead.',
        )
    failed = seen.source_errors + seen.handler_errors
    if failed and not seen.pages_poisoned:
        yield Advice("trouble", f"{several(failed, 'read or call', 'reads or calls')} failed for good.")
    if seen.source_retries:
        times = "; ".join(f"{duration(start)} to {duration(end)}" for start, end in run.outages()[:3])
        yield Advice(
            "trouble",
            f"{percent(seen.source_retries, seen.source_reads)} of the reads were further tries after a failure"
            f" ({seen.source_retries:,} of {seen.source_reads:,}{', at ' + times if times else ''}).",
        )


def _order(run: Run) -> Iterator[Advice]:
    """Yield what the order of the faults says of readahead."""
    facts, seen = run.facts, run.statistics
    faults = max(seen.faults - seen.joined, 0)
    if facts.records and not facts.readahead:
        yield Advice(
            "good", "record= without readahead serves page by page: the times are not those of a run without it."
        )
        return
    if facts.is_handler or faults < _FEW:
        return
    asked = max(seen.pages_fault, 1)
    if not facts.readahead:
        pages = seen.pages_fault / max(run.stretches, 1)
        if seen.pages_fault >= 16 * _FEW and pages >= 2 * _FEW:
            yield Advice(
                "hint",
                f"readahead=0: each of {several(seen.pages_fault, 'page')} was a fault of its own, and they lie in"
                f" stretches of {pages:,.0f} on average. With the default, one fault brings up to 2 MiB of a stretch.",
            )
        return
    window = (seen.pages_fault + seen.pages_readahead) / asked * facts.page_size
    share = percent(min(seen.sequential, faults), faults)
    if seen.sequential >= faults / 2:
        yield Advice(
            "good",
            f"{share} of the faults were sequential: readahead, in windows of {size(facts.readahead)} at most, brought"
            f" {size(window)} for each.",
        )
        return
    # A stream is brought two windows a fault, or more. The rest came along with faults that were in no order.
    strays = seen.pages_readahead - 2 * seen.sequential * facts.readahead // facts.page_size
    if strays >= 3 * asked:
        yield Advice(
            "hint",
            f"Only {share} of the faults were sequential, and readahead brought {window / facts.page_size:.0f} pages"
            " where one was asked for. If the others are not needed, readahead=0 fetches"
            f" {size(seen.pages_fault * facts.page_size)} instead of"
            f" {size((seen.pages_fault + seen.pages_readahead) * facts.page_size)}.",
        )


def _fetches(run: Run) -> Iterator[Advice]:
    """Yield what the bytes say of caches."""
    facts, seen = run.facts, run.statistics
    moved = seen.removes + seen.unmaps + seen.remaps + seen.pages_evicted
    shown = max(seen.pages - seen.pages_zero, 0) * facts.page_size if moved else run.resident
    times = seen.bytes_fetched / shown if shown else 0.0
    if times >= 1.5 and seen.source_reads and not facts.caches:
        forked = (
            f" {often(seen.forks).capitalize()} a child was forked, and each fetches for itself." if seen.forks else ""
        )
        yield Advice(
            "hint",
            f"Each page was fetched {times:.1f} times: {size(seen.bytes_fetched)} for {size(shown)}.{forked} With"
            " cache= it comes from this host the second time.",
        )
    again = seen.pages * facts.page_size / facts.size if facts.size else 0.0
    if seen.pages_evicted and again >= 1.2:
        yield Advice(
            "hint",
            f"Each page of the region came {again:.1f} times on average, with {several(seen.pages_evicted, 'page')}"
            " dropped: a larger max_resident keeps what is touched again.",
        )
    hits, misses = run.cache.get("hits", 0), run.cache.get("misses", 0)
    if hits + misses:
        kept = f"The cache had {percent(hits, hits + misses)} of the chunks that were needed"
        if evictions := run.cache.get("evictions", 0):
            yield Advice("hint", f"{kept}, and evicted {several(evictions, 'segment')}: a larger max_bytes keeps more.")
        else:
            yield Advice("good", f"{kept}.")


def _waits(run: Run) -> Iterator[Advice]:
    """Yield what the times say."""
    facts, seen = run.facts, run.statistics
    median, slow = seen.latency_ns(0.5), seen.latency_ns(0.99)
    read = seen.source_ns / seen.source_reads if seen.source_reads else 0.0
    waited = waited_ns(seen) / 1e9
    if read >= _FAR and median >= read / 2 and sum(seen.latency) >= _FEW and waited >= run.seconds / 10:
        what = "a call of the handler" if facts.is_handler else "a read of the source"
        if run.resident >= 0.8 * facts.size:
            better = f"{percent(run.resident, facts.size)} of the region was needed: background=True brings it ahead"
        elif facts.brings_ahead:
            better = "what was brought ahead was not what was touched: record= again, or prefetch() what comes next"
        else:
            better = "prefetch() what comes next, or record= the order once and replay= it"
        yield Advice(
            "hint",
            f"A fault took {duration(median / 1e9)} (median; 1 % of them {duration(slow / 1e9)}), and {what}"
            f" {duration(read / 1e9)} on average; all faults took {duration(waited)} together. So {better}.",
        )
    elif slow >= 50e6 and not seen.source_reads and sum(seen.latency) >= _FEW:
        yield Advice(
            "hint",
            f"1 % of the faults took {duration(slow / 1e9)}, though no read had to be waited for: the host was busy.",
        )
    at_hand = not seen.source_reads and not seen.forks and not facts.is_handler
    if at_hand and facts.engine.startswith("Pager(") and seen.faults >= 1000 and waited >= run.seconds / 20:
        yield Advice(
            "hint",
            f"All bytes were at hand, and {seen.faults:,} faults went through the pager: engine=InThread() places them"
            " in the touching thread, if no system call touches the region.",
        )
