"""The figures of one run of a Monitor, and the file that holds them: JSON, so that other programs can read it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, Self

import attrs

from aiouffd.engine.statistics import LATENCY_BUCKETS, Counters, Statistics
from aiouffd.report.words import several, size

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["COLUMNS", "Facts", "Run", "waited_ns"]

VERSION: Final = 1
_PAUSE: Final = 2.0  # seconds between two tries of a read, at most
COLUMNS: Final = (
    *("faults", "pages_fault", "pages_readahead", "pages_prefetch", "pages_replay", "pages_background"),
    *("bytes_fetched", "source_retries", "source_errors", "handler_errors", "restarts", "waited_ns"),
)
"""What a row of the timeline counts."""
_NAMES: Final = tuple(field.name for field in attrs.fields(Statistics) if field.name != "latency")


def waited_ns(statistics: Statistics) -> int:
    """Return about how long threads waited together: the middle of each bucket of the latency."""
    return sum(count * 3 * (1 << bits) // 4 for bits, count in enumerate(statistics.latency))


def _count(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ValueError(f"{attribute.name} is {value!r:.80}")


_text = attrs.validators.instance_of(str)
_bool = attrs.validators.instance_of(bool)


def _each(check: Any) -> Any:
    return attrs.validators.deep_iterable(check, attrs.validators.instance_of(list))


@attrs.frozen
class Facts:
    """What is known of a run from its beginning on.

    Attributes:
        source: what brought the pages.
        engine: where the loop ran.
        program: the command line.
        host: the versions of Linux, Python and aiouffd.
        began: the time, UTC.
        size: bytes of the region.
        page_size: bytes.
        readahead: bytes.
        is_handler: a `Handler` brought the pages, and no source.
        records: the order of touches was recorded, page by page.
        brings_ahead: a recording was replayed, or the background filled.
        caches: a `ChunkCache` was in between.
    """

    source: str = attrs.field(validator=_text)
    engine: str = attrs.field(validator=_text)
    program: str = attrs.field(validator=_text)
    host: str = attrs.field(validator=_text)
    began: str = attrs.field(validator=_text)
    size: int = attrs.field(validator=_count)
    page_size: int = attrs.field(validator=[_count, attrs.validators.ge(1)])
    readahead: int = attrs.field(validator=_count)
    is_handler: bool = attrs.field(default=False, validator=_bool)
    records: bool = attrs.field(default=False, validator=_bool)
    brings_ahead: bool = attrs.field(default=False, validator=_bool)
    caches: bool = attrs.field(default=False, validator=_bool)


@attrs.frozen
class Run:
    """What a run has come to.

    Attributes:
        facts: from its beginning on.
        ended: how.
        seconds: that it took.
        statistics: what was counted.
        width: seconds of a part of the timeline.
        rows: the timeline: `COLUMNS` of each part.
        film: looks at the region: (seconds, percent of each cell that had come).
        resident: bytes of the region that were present at the end.
        stretches: ranges of the region that were present at the end, neighbors joined.
        cache: what the `ChunkCache` has counted meanwhile, for all processes that use it.
        errors: what was reported, each text once, the first ones.
    """

    facts: Facts
    ended: str = attrs.field(validator=_text)
    seconds: float = attrs.field(validator=_count)
    statistics: Statistics
    width: float = attrs.field(validator=[_count, attrs.validators.gt(0)])
    rows: list[list[int]]
    film: list[tuple[float, list[int]]]
    resident: int = attrs.field(validator=_count)
    stretches: int = attrs.field(validator=_count)
    cache: dict[str, int] = attrs.field(factory=dict)
    errors: list[str] = attrs.field(factory=list, validator=_each(_text))

    def column(self, name: str) -> list[int]:
        """Return the counts of one of `COLUMNS`, of each part of the timeline."""
        index = COLUMNS.index(name)
        return [row[index] for row in self.rows]

    def outages(self) -> list[tuple[float, float]]:
        """Return the seconds from and until which reads failed, with the pauses between two tries."""
        found: list[tuple[float, float]] = []
        failures = zip(self.column("source_retries"), self.column("source_errors"), strict=True)
        for index, failed in enumerate(map(any, failures)):
            if failed:
                begin = index * self.width
                joined = bool(found) and begin - found[-1][1] <= _PAUSE
                start = found.pop()[0] if joined else begin
                found.append((start, (index + 1) * self.width))
        return found

    def to_json(self) -> str:
        """Return the text of its file."""
        return json.dumps({"aiouffd run": VERSION, **attrs.asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read the text of a file.

        Raises:
            ValueError: it is no such file, of a later version, or damaged.
        """
        try:
            values = json.loads(text)
            version = values.pop("aiouffd run")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError("it is no record of a run") from None
        if version != VERSION:
            raise ValueError(f"its version is {version!r:.40}; this library reads version {VERSION}")
        try:
            counted = values.pop("statistics")
            latency = tuple(_whole(counted.pop("latency"), LATENCY_BUCKETS))
            known = dict.fromkeys(_NAMES, 0) | dict(zip(counted, _whole(list(counted.values())), strict=True))
            return cls(
                facts=Facts(**values.pop("facts")),
                statistics=Statistics(**known, latency=latency),
                rows=[_whole(row, len(COLUMNS)) for row in values.pop("rows")],
                film=list(_film(values.pop("film"))),
                cache=dict(zip(values["cache"], _whole(list(values.pop("cache").values())), strict=True)),
                **values,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"it is damaged: {error}") from None

    def __str__(self) -> str:
        """Return one line."""
        faults = several(self.statistics.faults, "fault")
        return f"{self.facts.source}: {faults}, {size(self.resident)} of {size(self.facts.size)}"


def _whole(values: Any, length: int | None = None) -> list[int]:
    """Return a list of counts; ValueError for anything else."""
    if not isinstance(values, list) or length not in (None, len(values)):
        raise ValueError(f"{values!r:.80} are not {'' if length is None else length} counts")
    for value in values:
        if type(value) is not int or not 0 <= value < 1 << 64:
            raise ValueError(f"{value!r:.80} is no count")
    return values


def _film(looks: Any) -> Iterator[tuple[float, list[int]]]:
    before = 0.0
    for at, shares in looks:
        if not isinstance(at, int | float) or not before <= at < 1e12 or max(_whole(shares), default=0) > 100:
            raise ValueError(f"{at!r:.40} is no look at the region")
        before = at
        yield at, shares


NOTHING: Final = Counters().snapshot()
"""The statistics of a run that has done nothing."""
