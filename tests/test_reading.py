"""How long the reader in Python looks again, over a pipe in place of a descriptor."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

import pytest

from aiouffd.engine.reading import MESSAGES, PythonReader
from aiouffd.engine.statistics import Counters
from aiouffd.kernel import abi
from aiouffd.native.reader import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

TURN = 10_000_000_000


@pytest.fixture
def rig() -> Iterator[tuple[PythonReader, int]]:
    """Return a reader of the reading end of a pipe, and the writing end."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    epoll = select.epoll()
    epoll.register(reading, select.EPOLLIN)
    reader = PythonReader(epoll, Counters(), {})
    reader.land(memoryview(bytearray(MESSAGES * abi.MESSAGE_SIZE)), memoryview(bytearray(8)).cast("q"))
    reader.admit(reading, 1)
    yield reader, writing
    epoll.close()
    os.close(reading)
    os.close(writing)


def test_looking_again_is_for_as_long_as_faults_keep_coming(rig: tuple[PythonReader, int]) -> None:
    """A fault long after the last is followed by sleep; soon after, by a look; skipped ones by none."""
    reader, _ = rig
    reader.spin_ns = 50_000
    assert reader._patience(10_000_000) == 0
    assert reader._patience(10_000_000 + 100_001) == 0
    assert reader._patience(10_100_001 + 100_000) == 50_000
    reader._skip = 2
    assert [reader._patience(10_200_001) for _ in range(3)] == [0, 0, 50_000]


def test_vain_looks_make_the_next_ones_rarer(rig: tuple[PythonReader, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After three: 8 faults without a look, then 16, at most 64; a look that finds something is not vain."""
    reader, writing = rig

    def patience(now: int) -> int:
        reader._last_ns = now - 1
        return 1000

    monkeypatch.setattr(reader, "_patience", patience)
    skipped = []
    for _ in range(8):
        os.write(writing, bytes(abi.MESSAGE_SIZE))
        outcome, found = reader.run(TURN, came=False, once=False)
        assert (outcome, found.length) == (Outcome.MESSAGES, abi.MESSAGE_SIZE)
        assert reader.run(TURN, came=True, once=False) == (Outcome.IDLE, None)
        skipped.append(reader._skip)
    assert skipped == [0, 0, 8, 16, 32, 64, 64, 64]


def test_the_loop_gets_its_turn(rig: tuple[PythonReader, int]) -> None:
    """However long the reader would look."""
    reader, _ = rig
    reader.spin_ns = TURN
    assert reader.run(0, came=True, once=False)[0] in (Outcome.IDLE, Outcome.DUE)
    reader._last_ns = 1 << 62
    assert reader.run(0, came=True, once=False)[0] == Outcome.DUE
