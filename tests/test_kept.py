"""`engine.kept`: what is kept is what is taken, and room that was made is used again."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from aiouffd.engine import kept
from aiouffd.engine.kept import DUE, KEPT, LOOSE, Kept
from aiouffd.engine.mappings import Mapping
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.memory import address_of
from aiouffd.native.reader import Keeps

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
