"""`engine.statistics`: words in memory, and what is read from them."""

from __future__ import annotations

import mmap
import re

import pytest

from aiouffd.engine.statistics import SIZE, Counter, Counters, Statistics, told


def test_each_word_has_its_name() -> None:
    """A snapshot has all of them, the buckets of the latency behind each other."""
    counters = Counters()
    own = {
        Counter.LATENCY,
        Counter.HEARTBEAT,
        Counter.SLOTS,
        Counter.INHERITED,
        Counter.ENDED,
        Counter.USER,
    }  # of the pager
    names = [counter for counter in Counter if counter not in own]
    for counter in names:
        counters.words[counter] = 1000 + counter
    for bucket in range(48):
        counters.words[Counter.LATENCY + bucket] = bucket
    found = counters.snapshot()
    for counter in names:
        assert getattr(found, counter.name.lower()) == 1000 + counter
    assert found.latency == tuple(range(48))
    plain = told(counters.words.tolist())
    assert plain.pop("pages") == found.pages
    assert [plain.pop(f"latency_p{percent}_ns") for percent in (50, 99)] == [
        found.latency_ns(0.5),
        found.latency_ns(0.99),
    ]
    assert plain == {counter.name.lower(): 1000 + counter for counter in names}
    assert told(Counters().words.tolist()) == {"pages": 0, "latency_p50_ns": 0, "latency_p99_ns": 0}
    assert len(set(Counter)) == len(Counter.__members__)
    assert all(counter < Counter.LATENCY or counter >= Counter.LATENCY + 48 for counter in names)
    assert max(Counter) * 8 < SIZE


def test_each_field_is_explained() -> None:
    """In the order of the fields; the latency below its own."""
    assert Statistics.__doc__ is not None
    explained = re.findall(r"^ +(\w+): ", Statistics.__doc__.partition("Attributes:")[2], re.MULTILINE)
    assert [*explained, "latency"] == list(Statistics.__match_args__)


def test_a_page_that_was_brought_along_is_asked_for_after_all() -> None:
    """It is counted once; one that was counted otherwise stays what it was."""
    counters = Counters()
    counters.words[Counter.PAGES_READAHEAD] = 1
    for _ in range(2):
        counters.asked_for()
        found = counters.snapshot()
        assert (found.pages_fault, found.pages_readahead) == (1, 0)


def test_several_may_see_the_same_words() -> None:
    """In memory that is mapped by both."""
    memory = mmap.mmap(-1, 2 * SIZE)
    one, other = Counters(memory), Counters(memory)
    one.words[Counter.FAULTS] += 3
    assert other.snapshot().faults == 3
    one.words.release()
    other.words.release()
    memory.close()


def test_pages_are_of_every_cause() -> None:
    """Each page once, whatever brought it."""
    counters = Counters()
    causes = ("FAULT", "READAHEAD", "PREFETCH", "REPLAY", "BACKGROUND")
    for number, cause in enumerate(causes):
        counters.words[Counter[f"PAGES_{cause}"]] = 10**number
    assert counters.snapshot().pages == 11111


@pytest.mark.parametrize(
    ("buckets", "median", "most"),
    [({}, 0, 0), ({10: 1}, 1024, 1024), ({10: 98, 20: 2}, 1024, 1 << 20), ({10: 1, 20: 1}, 1024, 1 << 20)],
)
def test_quantiles_of_the_latency(buckets: dict[int, int], median: int, most: int) -> None:
    """The upper bound of the bucket that holds them."""
    counters = Counters()
    for bits, count in buckets.items():
        counters.words[Counter.LATENCY + bits] = count
    found = counters.snapshot()
    assert (found.latency_ns(0.5), found.latency_ns(0.99)) == (median, most)


def test_what_is_not_zero_is_said() -> None:
    """With two quantiles."""
    counters = Counters()
    assert str(counters.snapshot()) == "Statistics()"
    counters.words[Counter.FAULTS] = 3
    counters.words[Counter.LATENCY + 4] = 3
    assert str(counters.snapshot()) == "Statistics(faults=3, latency_ns(0.5)=16, latency_ns(0.99)=16)"
    assert isinstance(counters.snapshot(), Statistics)


@pytest.mark.parametrize(
    "counter",
    [
        *(Counter.PAGES_FAULT, Counter.PAGES_READAHEAD, Counter.PAGES_PREFETCH, Counter.PAGES_REPLAY),
        *(Counter.PAGES_BACKGROUND, Counter.PAGES_POISONED, Counter.CONTINUES, Counter.UNPROTECTS, Counter.EEXIST),
        *(Counter.ENOENT, Counter.FORKS, Counter.REMAPS, Counter.REMOVES, Counter.UNMAPS),
    ],
)
def test_whatever_lets_a_thread_go_is_progress(counter: Counter) -> None:
    """A worker that was killed after it was no vain life."""
    counters = Counters()
    before = counters.progress()
    counters.words[counter] += 1
    assert counters.progress() == before + 1


@pytest.mark.parametrize(
    "counter",
    [Counter.FAULTS, Counter.JOINED, Counter.PAGES_ZERO, Counter.EAGAIN, Counter.SOURCE_RETRIES, Counter.HEARTBEAT],
)
def test_what_lets_nobody_go_is_none(counter: Counter) -> None:
    """Else a worker that dies at each fault would be replaced for ever."""
    counters = Counters()
    before = counters.progress()
    counters.words[counter] += 1
    assert counters.progress() == before


def test_what_was_counted_ahead_is_taken_back() -> None:
    """Of the cause first, then of the faults; never below zero, since words know no sign."""
    counters = Counters()
    words = counters.words
    words[Counter.PAGES_PREFETCH], words[Counter.PAGES_ZERO], words[Counter.BYTES_FETCHED] = 5, 2, 4096
    counters.uncount(Counter.PAGES_PREFETCH, 2, 1, 4000)
    assert (words[Counter.PAGES_PREFETCH], words[Counter.PAGES_ZERO], words[Counter.BYTES_FETCHED]) == (3, 1, 96)
    words[Counter.PAGES_READAHEAD], words[Counter.PAGES_FAULT] = 1, 4
    counters.uncount(Counter.PAGES_READAHEAD, 3, 9, 4096)
    assert (words[Counter.PAGES_READAHEAD], words[Counter.PAGES_FAULT]) == (0, 2)
    assert (words[Counter.PAGES_ZERO], words[Counter.BYTES_FETCHED]) == (0, 0)
    counters.uncount(Counter.PAGES_READAHEAD, 9, 0, 0)
    assert words[Counter.PAGES_FAULT] == 0
