"""Counters and the latency histogram, in an array of 64-bit words.

The array may be memory that several processes map: what the worker counts, its keeper and the application read
there, and a successor goes on with. A word has one writer, so no lock is needed.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Counter", "Counters", "Statistics", "latency_ns", "told"]


class Counter(enum.IntEnum):
    """Which word counts what: `Statistics` says what each means."""

    FAULTS = 0
    JOINED = 1
    PAGES_FAULT = 2
    PAGES_READAHEAD = 3
    PAGES_PREFETCH = 4
    PAGES_REPLAY = 5
    PAGES_BACKGROUND = 6
    PAGES_ZERO = 7
    PAGES_POISONED = 8
    BYTES_FETCHED = 9
    COPIES = 10
    ZEROPAGES = 11
    CONTINUES = 12
    WAKES = 13
    EAGAIN = 14
    EEXIST = 15
    ENOENT = 16
    PARTIAL = 17
    DEFERRED = 18
    FORKS = 19
    REMAPS = 20
    REMOVES = 21
    UNMAPS = 22
    SOURCE_RETRIES = 23
    SOURCE_ERRORS = 24
    HANDLER_ERRORS = 25
    IN_FLIGHT = 26
    BYTES_IN_FLIGHT = 27
    RESTARTS = 28
    CLIENTS = 29
    SPACES = 30
    POISONS = 31
    LATENCY = 32  # 48 buckets follow: index is the bit length of the nanoseconds
    HEARTBEAT = 80  # goes up twice a second as long as the loop runs
    UNPROTECTS = 81
    PROTECTS = 82
    WRITE_FAULTS = 83
    MINOR_FAULTS = 84
    SLOTS = 85  # arrays of words behind this one that have been used
    SLOWED = 86
    INHERITED = 87  # of `Counters.progress`: what other pagers have made of it
    ENDED = 88  # progress of those whose slots others have by now
    ASKED_AGAIN = 89  # pages that could not be had, and are asked for again: once for each time
    SEQUENTIAL = 90
    SOURCE_READS = 91
    SOURCE_NS = 92
    PAGES_EVICTED = 93
    RESIDENT = 94  # bytes
    PAGES_WRITTEN_BACK = 95
    BYTES_SHARED = 96
    MOVES = 97
    USER = 98  # a number of whoever is counted here


LATENCY_BUCKETS = 48
WORDS = 128
SIZE = WORDS * 8


@attrs.frozen(repr=False)
class Statistics:
    """A snapshot of what has been counted since the Monitor was entered.

    Attributes:
        faults: messages of missing pages, joined and repeated ones included.
        joined: of these, faults on a page that was on its way already, or had come by the time they were read.
        pages_fault: pages that were asked for by a fault.
        pages_readahead: pages that were brought along with a fault.
        pages_prefetch: pages that a prefetch brought, or a populating exit.
        pages_replay: pages that a recording brought.
        pages_background: pages that the background fill brought.
        pages_zero: of all these pages, those that were filled with zeros.
        pages_poisoned: pages that could not be had.
        bytes_fetched: bytes that were taken from the source.
        copies: UFFDIO_COPY, each for one or many pages.
        zeropages: UFFDIO_ZEROPAGE.
        continues: UFFDIO_CONTINUE, for pages that the file of shared memory had already.
        wakes: UFFDIO_WAKE.
        eagain: answers of the kernel that the layout is changing.
        eexist: answers that the page is there already.
        enoent: answers that the memory is gone.
        partial: answers that a part was done.
        deferred: runs of pages that were put off for another try.
        forks: processes that were forked and are served.
        remaps: moves of memory (mremap).
        removes: ranges that were emptied (MADV_DONTNEED and the like).
        unmaps: ranges that were unmapped.
        source_retries: further tries of reads.
        source_errors: reads that failed for good.
        handler_errors: calls of a handler that failed.
        in_flight: source reads and handlers that are under way now.
        bytes_in_flight: bytes of source reads that are under way now.
        restarts: workers that died and were replaced.
        clients: clients of a server, now.
        spaces: address spaces that are served now, those of forked children included.
        poisons: UFFDIO_POISON.
        unprotects: UFFDIO_WRITEPROTECT that lets a page be written to.
        protects: UFFDIO_WRITEPROTECT that protects.
        write_faults: messages of writes to protected pages.
        minor_faults: messages of pages that the file has and the mapping does not.
        slowed: times that a client was not read for a while, since it had used up what it may have in a second.
        asked_again: times that a page could not be had and was asked for again (`on_error="retry"`).
        sequential: faults that went on where earlier ones had been, in order or by a stride: readahead follows them. It
            counts none with `readahead=0`, nor with a handler.
        source_reads: reads of the source that had to be waited for, further tries included; with a handler, its calls.
        source_ns: nanoseconds that all of these took together.
        pages_evicted: pages that were dropped, to be brought again when they are touched.
        resident: bytes that are there now, where pages are dropped (`max_resident`).
        pages_written_back: pages that were written and have gone to the source (`write_back`).
        bytes_shared: bytes that were not taken from the source: what others read of it had them already, or a
            recording carries them.
        moves: UFFDIO_MOVE, each for a huge page, in place of a COPY.
    """

    faults: int
    joined: int
    pages_fault: int
    pages_readahead: int
    pages_prefetch: int
    pages_replay: int
    pages_background: int
    pages_zero: int
    pages_poisoned: int
    bytes_fetched: int
    copies: int
    zeropages: int
    continues: int
    wakes: int
    eagain: int
    eexist: int
    enoent: int
    partial: int
    deferred: int
    forks: int
    remaps: int
    removes: int
    unmaps: int
    source_retries: int
    source_errors: int
    handler_errors: int
    in_flight: int
    bytes_in_flight: int
    restarts: int
    clients: int
    spaces: int
    poisons: int
    unprotects: int
    protects: int
    write_faults: int
    minor_faults: int
    slowed: int
    asked_again: int
    sequential: int
    source_reads: int
    source_ns: int
    pages_evicted: int
    resident: int
    pages_written_back: int
    bytes_shared: int
    moves: int
    latency: tuple[int, ...]
    """How many faults took [2**(n-1), 2**n) nanoseconds from being read to being resolved, for each n.

    A fault is counted here when it is resolved, so a moment after its thread may have gone on.

    The time that a fault has waited before it was read is not in it: the kernel's messages have no time. `InThread`
    counts from the signal on, so there it is the whole wait of the faults that the C handler resolves.
    """

    def __repr__(self) -> str:
        """Say what is not zero."""
        said = {name: getattr(self, name) for name in _NAMES}
        said |= {f"latency_ns({quantile})": self.latency_ns(quantile) for quantile in (0.5, 0.99)}
        return f"Statistics({', '.join(f'{name}={value}' for name, value in said.items() if value)})"

    @property
    def pages(self) -> int:
        """All pages resolved, whatever the cause."""
        return self.pages_fault + self.pages_readahead + self.pages_prefetch + self.pages_replay + self.pages_background

    def latency_ns(self, quantile: float) -> int:
        """Return the upper bound of the bucket that holds this quantile (0.5: the median), 0 where nothing is."""
        return latency_ns(self.latency, quantile)


def latency_ns(histogram: Sequence[int], quantile: float) -> int:
    """Return as `Statistics.latency_ns` does."""
    seen, wanted = 0, quantile * sum(histogram)
    for bits, count in enumerate(histogram):
        seen += count
        if count and seen >= wanted:
            return 1 << bits
    return 0


_NAMES = tuple(field.name for field in attrs.fields(Statistics) if field.name != "latency")
_PLACES = tuple((name, int(Counter[name.upper()])) for name in _NAMES)
_LATENCY = slice(int(Counter.LATENCY), int(Counter.LATENCY) + LATENCY_BUCKETS)


def told(words: Sequence[int]) -> dict[str, int]:
    """Return what has been counted, as plain values: a tenth of the time that `Counters.snapshot` and `asdict` take.

    What is not zero, by its name in `Statistics`, and `pages`, `latency_p50_ns` and `latency_p99_ns`.
    """
    found = {name: words[at] for name, at in _PLACES if words[at]}
    histogram = words[_LATENCY]
    found["pages"] = sum(words[Counter.PAGES_FAULT : Counter.PAGES_BACKGROUND + 1])
    found["latency_p50_ns"], found["latency_p99_ns"] = latency_ns(histogram, 0.5), latency_ns(histogram, 0.99)
    return found


class Counters:
    """The words themselves. `words[Counter.X] += n` is how the engine counts.

    Args:
        memory: at least `SIZE` writable bytes; by default a private bytearray.
    """

    __slots__ = ("words",)

    def __init__(self, memory: Any = None) -> None:
        data = memoryview(bytearray(SIZE) if memory is None else memory)
        self.words: memoryview[int] = data[:SIZE].cast("B").cast("Q")

    def uncount(self, cause: Counter, pages: int, zeros: int, fetched: int) -> None:
        """Take back what was counted ahead, of pages that were present already or are gone.

        Args:
            cause: one of the PAGES counters.
            pages: how many; those that a fault has asked for are counted as PAGES_FAULT, not as PAGES_READAHEAD.
            zeros: how many of them were to be filled with zeros.
            fetched: bytes of them that were to be taken from the source.
        """
        words = self.words
        counted = min(pages, words[cause])
        words[cause] -= counted
        words[Counter.PAGES_FAULT] -= min(pages - counted, words[Counter.PAGES_FAULT])
        words[Counter.PAGES_ZERO] -= min(zeros, words[Counter.PAGES_ZERO])
        words[Counter.BYTES_FETCHED] -= min(fetched, words[Counter.BYTES_FETCHED])

    def asked_for(self) -> None:
        """Count a page that was counted as brought along as asked for by a fault, unless it was counted otherwise."""
        moved = min(self.words[Counter.PAGES_READAHEAD], 1)
        self.words[Counter.PAGES_READAHEAD] -= moved
        self.words[Counter.PAGES_FAULT] += moved

    def progress(self) -> int:
        """Return a number that is another one whenever a thread that waited has been let go, in whatever way."""
        words = self.words
        pages = sum(words[Counter.PAGES_FAULT : Counter.PAGES_BACKGROUND + 1])
        # A page that was present already (EEXIST) or is gone (ENOENT) is counted as no page, and its thread is woken.
        others = (*(Counter.PAGES_POISONED, Counter.CONTINUES, Counter.UNPROTECTS, Counter.EEXIST, Counter.ENOENT),)
        # A thread that forks, moves, empties or unmaps memory sleeps until its event has been read.
        return pages + sum(words[at] for at in others) + sum(words[Counter.FORKS : Counter.UNMAPS + 1])

    def snapshot(self) -> Statistics:
        """Read all words. Each is exact; between two of them the engine may have gone on."""
        words = self.words.tolist()
        return Statistics(**{name: words[at] for name, at in _PLACES}, latency=tuple(words[_LATENCY]))
