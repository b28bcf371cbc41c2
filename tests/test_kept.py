"""`engine.kept`: what is kept is what is taken, and room that was made is used again."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiouffd.engine import kept
from aiouffd.engine.kept import DUE, EMPTIED, KEPT, LOOSE, PROTECTED, Granules, Kept, among, blocks, runs
from aiouffd.engine.mappings import Mapping
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.memory import address_of
from aiouffd.native.reader import Keeps
from aiouffd.ranges import RangeSet

if TYPE_CHECKING:
    import pytest

PAGE = 4096
START = 1 << 20
MEMORY: Any = SimpleNamespace(fileno=lambda: 7, start=START)


def test_what_is_kept_is_taken() -> None:
    """Against a dictionary, in an order by chance, until there is no room; then there is, as much as before."""
    pages = Kept(Mapping(START, START + 16 * PAGE, 4 * PAGE), 40, PAGE, 9 * PAGE, Counters())
    pages.allow(Keeps.DUE_KEPT)
    native = pages.native
    assert (native.start, native.count, native.first, native.page) == (START, 16, 4, PAGE)
    assert native.states == address_of(pages.states)
    chance = random.Random(1)
    for _ in range(2):
        pages.states[:] = bytes([DUE]) * 40
        pages.begin(MEMORY)
        assert (native.memory, native.at, native.keeps, pages.pages) == (7, START, Keeps.DUE_KEPT, 0)
        model, count = dict[int, bytes](), 0
        for step in range(200):
            index = chance.randrange(40)
            assert pages.is_full == (len(model) == 9)
            if pages.states[index] == DUE and not pages.is_full:
                model[index] = step.to_bytes(8, "little") * (PAGE // 8)
                pages.keep(index, model[index])
                count += 1
            elif not step % 8:
                last = min(index + 4, 40)
                assert pages.take(index, last) == [(at, model.pop(at)) for at in range(index, last) if at in model]
                pages.states[index:last] = pages.states[index:last].replace(bytes([KEPT]), bytes([DUE]))
            assert {at for at in range(40) if pages.states[at] == KEPT} == set(model)
        assert (pages.pages, count > 9) == (count, True)
        pages.end()
        assert pages.is_full
    pages.states[:] = bytes([LOOSE]) * 40
    assert pages.take(0, 40) == []
    assert list(range(5)) == [kept.LOOSE, kept.PROTECTED, DUE, KEPT, kept.EMPTIED]


def test_one_page_is_kept_in_any_case() -> None:
    """A huge page may be larger than what is kept at most."""
    pages = Kept(Mapping(0, 2 * PAGE, 0), 2, PAGE, PAGE // 2, Counters())
    pages.begin(MEMORY)
    pages.keep(1, bytes(PAGE))
    assert pages.is_full


def test_runs_and_blocks_of_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a regular expression finds them, from anywhere to anywhere; long runs in parts."""
    chance = random.Random(2)
    wanted = among(LOOSE, EMPTIED)
    for _ in range(300):
        states = bytes(chance.choices([LOOSE, PROTECTED, EMPTIED], weights=[1, chance.randrange(8), 1], k=41))
        first, last = sorted(chance.choices(range(42), k=2))
        assert list(runs(states, wanted, first, last)) == [
            found.span() for found in re.compile(b"[\0\4]+").finditer(states, first, last)
        ]
        found = RangeSet()
        for page in (page for page in range(41) if states[page] != PROTECTED):
            found.add(page - page % 8, min(page - page % 8 + 8, 41))
        assert list(blocks(states, wanted, 8)) == [(block.start, block.end) for block in found]
    monkeypatch.setattr(kept, "_COPIED", 16)
    assert list(runs(bytes(40), wanted, 3)) == [(3, 19), (19, 35), (35, 40)]


def test_what_differs_is_read_in_whole_granules() -> None:
    """What is protected in them is due; what is missing or emptied stays so. The last one may be shorter."""
    states = bytearray([PROTECTED, LOOSE, EMPTIED, DUE] * 5 + [PROTECTED] * 2)
    differing = Granules(states, PAGE, 4 * PAGE)
    differing.add(7, 9)
    differing.add(17, 18)
    differing.add(21, 22)
    added, others = bytes([DUE, LOOSE, EMPTIED, DUE]), bytes([PROTECTED, LOOSE, EMPTIED, DUE])
    assert states == others + 2 * added + others + added + bytes([DUE] * 2)
    assert [(item.start // PAGE, item.end // PAGE) for item in differing.found] == [(4, 12), (16, 22)]
    whole = Granules(states, 4 * PAGE, PAGE)  # a page is larger
    whole.add(1, 2)
    assert [item.length for item in whole.found] == [4 * PAGE]
