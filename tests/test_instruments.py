"""`otel.instruments`: what a reader of metrics is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Sum

from aiouffd.engine.statistics import Counter, Counters, Statistics
from aiouffd.errors import PagerDiedError
from aiouffd.otel.instruments import Counts, Instruments
from aiouffd.report.measures import MEASURES

NOTHING = Counters().snapshot()


def read(reader: InMemoryMetricReader) -> dict[str, dict[tuple[Any, ...], float]]:
    """Return the values by the names of the metrics and their attributes."""
    data = reader.get_metrics_data()
    assert data is not None
    (resource,) = data.resource_metrics
    (scope,) = resource.scope_metrics
    return {
        metric.name: {tuple((point.attributes or {}).values()): point.value for point in metric.data.data_points}
        for metric in scope.metrics
        if isinstance(metric.data, Sum)
    }


def test_the_sums_of_all_and_of_what_has_ended() -> None:
    """Counters never go down, whatever is left, dies or is collected; gauges are of what is there."""
    reader = InMemoryMetricReader()
    instruments = Instruments(MeterProvider([reader]).get_meter("x"))
    words = Counters()
    words.words[Counter.FAULTS], words.words[Counter.PAGES_ZERO] = 9, 1
    answers: list[Any] = [attrs.evolve(NOTHING, faults=3, pages_fault=2, pages_replay=1, spaces=1, source_ns=2 * 10**9)]
    monitor = Counts(lambda: answers[-1])
    latency = tuple(5 if bits == 12 else 0 for bits in range(len(NOTHING.latency)))
    server = Counts(
        lambda: attrs.evolve(NOTHING, faults=10, clients=2, latency=latency),
        lambda: 4,
        lambda: [("vm1", 2, words.words.tolist())],
    )
    instruments.add(monitor)
    instruments.add(server)
    found = read(reader)
    assert {f"aiouffd.{measure.path}" for measure in MEASURES} <= set(found)
    assert found["aiouffd.faults"] == {(): 13}
    assert (found["aiouffd.pages"][("fault",)], found["aiouffd.pages"][("replay",)]) == (2, 1)
    assert found["aiouffd.source.time"] == {(): 2.0}
    assert found["aiouffd.client.rejected"] == {(): 4}
    assert found["aiouffd.session.faults"] == {("vm1",): 9}
    assert found["aiouffd.session.client.count"] == {("vm1",): 2}
    assert found["aiouffd.fault.latency.bucket"][("+Inf",)] == 5
    assert found["aiouffd.fault.latency.bucket"][("1.024e-06",)] == 0
    instruments.remove(server)
    instruments.remove(server)
    answers.append(attrs.evolve(NOTHING, faults=1))  # while a keeper is replaced, counters read low for a moment
    found = read(reader)
    assert found["aiouffd.faults"] == {(): 13}
    assert found["aiouffd.client.count"] == {(): 0}
    assert "aiouffd.session.faults" not in found
    assert found["aiouffd.fault.latency.bucket"][("+Inf",)] == 5
    answers.append(None)  # it was collected
    found = read(reader)
    assert (found["aiouffd.faults"], found["aiouffd.address_space.count"]) == ({(): 13}, {(): 0})

    def died() -> Statistics:
        raise PagerDiedError("it died")

    instruments.add(Counts(died))
    assert read(reader)["aiouffd.faults"] == {(): 13}


def test_the_reference_lists_them() -> None:
    """Names, units, kinds, texts and the values of attributes."""
    reader = InMemoryMetricReader()
    instruments = Instruments(MeterProvider([reader]).get_meter("x"))
    session = ("", 0, Counters().words.tolist())
    instruments.add(Counts(Counters().snapshot, sessions=lambda: [session]))
    data = reader.get_metrics_data()
    assert data is not None
    rows = []
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        assert isinstance(metric.data, Sum)
        labels = [pair for point in metric.data.data_points for pair in (point.attributes or {}).items()]
        name = f"{metric.name}{{{labels[0][0]}}}" if labels else metric.name
        values = ", ".join(f"`{value}`" for label, value in labels if label != "le" and value)
        kind = "counter" if metric.data.is_monotonic else "up-down counter"
        rows.append(f"| `{name}` | {metric.unit} | {kind} | {metric.description}{values and f': {values}'} |")
    text = (Path(__file__).parent.parent / "docs" / "reference" / "opentelemetry.md").read_text()
    assert [line for line in text.partition("## Metrics")[2].splitlines() if line.startswith("| `")] == rows
