"""What only the native reader does."""

from __future__ import annotations

import select

import pytest
from pattern import PAGE
from reading_rig import PAGES, SOURCE, Rig, first
from scenario import play

from aiouffd.native.reader import WORDS, NativeReader, Outcome


def strangers() -> None:
    """Scenario: with readahead, faults near a stream or near each other are the engine's."""
    rig = Rig("native")
    line = rig.reader._lines[rig.fd]
    line.opened = (
        rig.world.at(0),
        rig.world.at(PAGES),
        0,
        (None, rig.source.size, PAGE, 0, True, None, rig.source.memory()),
    )
    rig.reader._describe(rig.fd, line, near=PAGE)
    rig.reader._reader.watch(rig.fd, [rig.world.at(20), rig.world.at(22)])
    for thread, (page, is_plain) in enumerate(
        [(3, True), (4, False), (30, True), (29, False), (20, False), (21, False), (22, True), (10, True)]
    ):
        rig.world.touch(page, thread)
        if is_plain:
            rig.run(Outcome.IDLE)
            assert first(page).startswith(bytes(rig.world.got(thread)))  # type: ignore[arg-type]
        else:
            assert rig.left() == [page]
    rig.counts(faults=4, pages_fault=4)


def test_only_strangers_are_plain_with_readahead() -> None:
    """See the scenario."""
    play(strangers)


def storm() -> None:
    """Scenario: sixteen threads fault at once, two of them on one page, one behind the source."""
    rig = Rig("native")
    rig.open()
    pages = [*range(0, 28, 2), 0, SOURCE + 3]
    for thread, page in enumerate(pages):
        rig.world.touch(page, thread)
    assert rig.left() == [SOURCE + 3]
    for thread, page in enumerate(pages[:-1]):
        assert first(page).startswith(bytes(rig.world.got(thread)))  # type: ignore[arg-type]
    rig.counts(faults=15, pages_fault=14, copies=14)


def test_a_storm_is_served_in_one_read() -> None:
    """All but what is not plain, which comes first in the landing."""
    play(storm)


def test_nothing_is_read_after_the_end() -> None:
    """A call raises; C would read memory that was freed."""
    with select.epoll() as epoll:
        reader = NativeReader(epoll.fileno(), [0] * len(WORDS))
        reader.close()
        with pytest.raises(AttributeError):
            reader.run(0, came=False, once=True)
        with pytest.raises(AttributeError):
            reader.close()
