"""`engine.places`: which address has which offset of an image."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from pattern import PAGE

from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.places import Places
from aiouffd.kernel.memory import ProcessMemory
from aiouffd.ranges import Range

LOW, HIGH = 1 << 20, 1 << 24
ROWS = [Mapping(LOW, LOW + 4 * PAGE, 8 * PAGE), Mapping(HIGH, HIGH + 4 * PAGE, 0)]


def test_parts_of_a_memory_file() -> None:
    """Shown at several addresses, not in order, with a hole between them; a part is emptied, and one unmapped."""
    places, mappings = Places(reversed(ROWS), ours=False), Mappings(ROWS)
    assert places == Places(ROWS, ours=True)
    assert hash(places) == hash(Places(ROWS, ours=True))
    assert places.end == 12 * PAGE
    assert [places.offset(at) for at in (LOW + PAGE, HIGH, LOW - 1)] == [9 * PAGE, 0, -1]
    assert places.addresses(3 * PAGE, 9 * PAGE) == [
        Mapping(LOW, LOW + PAGE, 8 * PAGE),
        Mapping(HIGH + 3 * PAGE, HIGH + 4 * PAGE, 3 * PAGE),
    ]
    assert list(places.offsets(0, HIGH + PAGE)) == [(8 * PAGE, 12 * PAGE), (0, PAGE)]
    assert not list(places.changed(mappings))
    spans = [(PAGE, 10 * PAGE)]
    assert list(places.mapped_of(spans, mappings)) == [(PAGE, 4 * PAGE), (8 * PAGE, 10 * PAGE)]
    mappings.remove(HIGH + PAGE, HIGH + 2 * PAGE)
    mappings.unmap(LOW, LOW + PAGE)
    assert list(places.changed(mappings)) == [Range(8 * PAGE, PAGE), Range(PAGE, PAGE)]
    assert places.mapped(mappings) == [(LOW + PAGE, LOW + 4 * PAGE), (HIGH, HIGH + 4 * PAGE)]
    assert list(places.mapped_of(spans, mappings)) == [(PAGE, 4 * PAGE), (9 * PAGE, 10 * PAGE)]
    missing = [tuple(number // PAGE for number in found) for found in places.missing(mappings, 0, 14 * PAGE)]
    assert sorted(missing) == [(0, 0, 1), (2, 2, 2), (4, 4, 4), (9, 9, 3), (12, 12, 2)]
    with ProcessMemory(os.memfd_create("memory")) as memory:
        os.ftruncate(memory.file, 12 * PAGE)
        os.pwrite(memory.file, b"x", 9 * PAGE)
        assert places.there(memory, None, PAGE, 1.0) == [(9 * PAGE, 10 * PAGE)]


def test_a_region_of_this_process() -> None:
    """Private memory, of which the pagemap tells; it has grown by a page, which no mapping has."""
    places, memory = Places([(LOW, LOW + 4 * PAGE, 0)], ours=True), SimpleNamespace(file=-1)
    mappings, spans = Mappings([Mapping(LOW, LOW + 3 * PAGE, 0)]), [(PAGE, 2 * PAGE)]
    pagemap: Any = SimpleNamespace(spans=lambda start, *_: [(start + low, start + high) for low, high in spans])
    assert places.there(memory, pagemap, PAGE, 1.0) == spans  # type: ignore[arg-type]
    assert places.mapped(mappings) == [(LOW, LOW + 4 * PAGE)]
    assert places.mapped_of(spans, mappings) is spans
    assert places.mapped(Mappings()) == [(LOW, LOW + 4 * PAGE)]
