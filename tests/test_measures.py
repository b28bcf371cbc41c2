"""`report.measures`: the list of what is measured."""

from __future__ import annotations

import attrs

from aiouffd.engine.statistics import LATENCY_BUCKETS, Statistics
from aiouffd.report.measures import LATENCY, MEASURES, buckets


def test_each_is_counted_and_has_a_name_of_its_own() -> None:
    """For Prometheus and for OpenTelemetry; no name is the beginning of another's path and a name at once."""
    counted = {field.name for field in attrs.fields(Statistics)} | {"rejected"}
    assert {name for measure in (*MEASURES, LATENCY) for name in measure.counts.values()} <= counted
    for names in ([each.name for each in MEASURES], [each.path for each in MEASURES]):
        assert len(set(names)) == len(names)
    assert all(bool(measure.label) == (set(measure.counts) != {""}) for measure in MEASURES)


def test_values_and_totals() -> None:
    """By label, in the unit; what is not there is zero."""
    pages = next(measure for measure in MEASURES if measure.name == "pages")
    counted = {"pages_fault": 3, "pages_replay": 4, "source_ns": 1_500_000_000}
    assert dict(pages.values(counted)) == {"fault": 3, "readahead": 0, "prefetch": 0, "replay": 4, "background": 0}
    assert pages.total(counted) == 7
    seconds = next(measure for measure in MEASURES if measure.name == "source_seconds")
    assert seconds.total(counted) == 1.5


def test_buckets_add_up() -> None:
    """From a microsecond on; the last one has all."""
    histogram = [0] * LATENCY_BUCKETS
    histogram[3], histogram[11], histogram[40] = 1, 2, 4
    found = list(buckets(histogram))
    assert found[:2] == [("1.024e-06", 1), ("2.048e-06", 3)]
    assert found[-2:] == [("8.589934592", 3), ("+Inf", 7)]
