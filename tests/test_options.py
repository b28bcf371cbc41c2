"""What a Monitor is asked for, before anything is done: sound, or an error that says what is wrong."""

from __future__ import annotations

import re
from typing import Any

import attrs
import numpy as np
import pytest

import aiouffd
from aiouffd.engine.statistics import Counter, Counters
from aiouffd.errors import BusyError, operation_error


@pytest.mark.parametrize(
    "option",
    [
        {"readahead": -1},
        {"background": -1},
        {"timeout": 0},
        {"timeout": -1.0},
        {"retries": -1},
        {"concurrent_reads": 0},
        {"bytes_in_flight": 0},
    ],
)
def test_a_number_that_would_never_serve_a_page_is_refused(option: dict[str, Any]) -> None:
    """At once, by its name."""
    with pytest.raises(ValueError, match=next(iter(option))):
        aiouffd.Monitor(aiouffd.Region(1), **option)


@pytest.mark.parametrize(
    "option",
    [
        {"readahead": "2M"},
        {"readahead": None},
        {"concurrent_reads": 1.5},
        {"bytes_in_flight": "1"},
        {"timeout": "1"},
        {"retries": 1.5},
        {"background": "fast"},
        {"background": None},
        {"engine": aiouffd.InThread},
        {"engine": "thread"},
        {"engine": 5},
    ],
)
def test_an_option_of_a_wrong_type_is_refused(option: dict[str, Any]) -> None:
    """At once, by its name, with what was given."""
    ((name, value),) = option.items()
    with pytest.raises(TypeError, match=re.escape(f"{name}= takes a") + ".*" + re.escape(repr(value))):
        aiouffd.Monitor(aiouffd.Region(1), **option)


def test_numbers_of_other_libraries_are_numbers() -> None:
    """Those of numpy for example."""
    options: dict[str, Any] = {"readahead": np.int64(0), "retries": np.int32(1), "timeout": np.float32(1)}
    length: Any = np.int64(5)
    aiouffd.Monitor(aiouffd.Region(length), **options)


@pytest.mark.parametrize("engine", [aiouffd.Pager, aiouffd.InProcess, aiouffd.InThread])
@pytest.mark.parametrize("option", [{"spin_us": -1}, {"stuck_warning": 0}, {"stuck_limit": 0}, {"stuck_limit": -1.0}])
def test_an_engine_refuses_the_same(engine: Any, option: dict[str, Any]) -> None:
    """At once, by its name; what it does not have is a TypeError."""
    name = next(iter(option))
    error = ValueError if name in attrs.fields_dict(engine) else TypeError
    with pytest.raises(error, match=name):
        engine(**option)


@pytest.mark.parametrize("thing", ["a path", b"bytes", aiouffd.ZeroSource, aiouffd.Handler, 5, lambda: None])
def test_what_is_neither_source_nor_handler_is_refused(thing: Any) -> None:
    """At once, and not by the process that it would have to travel to."""
    with pytest.raises(TypeError, match="is no Source and no Handler"):
        aiouffd.Monitor(aiouffd.Region(1), thing)


def test_a_region_that_is_closed_is_refused() -> None:
    """With the same error, whether there is a source or not."""
    region = aiouffd.Region(1)
    region.close()
    for source in (None, aiouffd.ZeroSource(1)):
        with pytest.raises(aiouffd.ClosedError, match="region is closed"):
            aiouffd.Monitor(region, source)


def test_a_monitor_says_what_it_is() -> None:
    """Of what, and by whom."""
    text = repr(aiouffd.Monitor(aiouffd.Region(100), aiouffd.BufferSource(b"abc")))
    assert "100 bytes at 0x" in text
    assert "BufferSource(3 bytes)" in text
    assert "not entered" in text
    assert "ServedBy(path='/run/x'" in repr(aiouffd.Monitor(aiouffd.Region(1), engine=aiouffd.ServedBy("/run/x")))


def test_a_storm_of_errors_that_nobody_asks_for_is_bounded() -> None:
    """The first thousand are kept, in order, and whatever ends it all."""
    monitor = aiouffd.Monitor(aiouffd.Region(1))
    for offset in range(1000):
        monitor._errors.put(aiouffd.SourceError("source", offset, 1, "no"))
    for _ in range(1000):
        monitor._errors.put(aiouffd.PagerError("a defect"))
    monitor._errors.put(aiouffd.PagerDiedError("given up"))
    for offset in range(1000):
        with pytest.raises(aiouffd.SourceError) as caught:
            monitor.check()
        assert caught.value.offset == offset
    with pytest.raises(aiouffd.PagerDiedError):
        monitor.check()
    monitor.check()


def test_busy_says_what_to_do() -> None:
    """By operation."""
    assert "leave its `with` block" in str(operation_error("munmap", 0, 1, 16))
    assert "make another Region" in str(operation_error("UFFDIO_REGISTER", 0, 1, 16))
    assert isinstance(operation_error("UFFDIO_MOVE", 0, 1, 16), BusyError)


def test_statistics_print_what_has_happened() -> None:
    """And no zeros."""
    counters = Counters()
    counters.words[Counter.FAULTS] += 2
    assert str(counters.snapshot()) == "Statistics(faults=2)"
