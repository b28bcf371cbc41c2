"""`monitor.checkpointer`: layer after layer, of which the old ones become fewer, and from which a program goes on."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pattern import PAGE, content
from scenario import eventually, play

import aiouffd
from aiouffd.errors import PagerDiedError
from aiouffd.monitor.checkpointer import thinned
from aiouffd.store import verify_sync

PAGES = 128
SIZE = PAGES * PAGE


@given(st.integers(2, 9), st.integers(1, 300))
def test_old_layers_become_fewer(keep: int, count: int) -> None:
    """The newest are all there, and of any age there is one that is at most four times as old."""
    kept = list[int]()
    for number in range(1, count + 1):
        kept.append(number)
        for old in thinned(kept, keep):
            kept.remove(old)
    assert kept[-keep:] == list(range(max(count - keep, 0) + 1, count + 1))
    assert len(kept) <= 2 * keep + keep * count.bit_length()
    for age in range(keep, count // 4):
        assert any(age <= count - number <= 4 * age for number in kept), (age, kept)


def written(folder: str) -> None:
    """Scenario: layers of a region, by time and by hand; a program that goes on from the last."""
    place = Path(folder) / "layers"
    assert aiouffd.Checkpointer.last_of(place) is None
    with aiouffd.Monitor(aiouffd.Region(SIZE), aiouffd.BufferSource(content(0, SIZE))) as monitor:
        region = monitor.region
        with aiouffd.Checkpointer(monitor, place, every=0.01, keep=2, grace=0) as layers:
            region[5] = 1
            eventually(lambda: int(Path(layers.last or "0").stem) >= 6, expected=True)
        assert layers.error is None
        with aiouffd.Checkpointer(monitor, place, keep=2, codec="lz4") as layers:
            region[SIZE - 1] = 2
            result = layers.take_sync()
            assert result.bytes == 64 << 10  # one chunk, whoever has written the layer before
            assert asyncio.run(layers.take()).bytes == 0
            os.rename(layers.last or "", place / "other.snap")  # noqa: PTH104 - a text
            with pytest.raises(aiouffd.StoreError, match="no such snapshot"):
                layers.take_sync()
            assert isinstance(layers.error, aiouffd.StoreError)
            os.rename(place / "other.snap", layers.last or "")  # noqa: PTH104 - as above
        last = layers.last
    assert len(list(place.glob("*.snap"))) <= 7
    assert not [error for path in place.glob("*.snap") for error in verify_sync(path)]
    assert aiouffd.Checkpointer.last_of(place) == last
    assert last is not None
    with aiouffd.open(last) as region:
        with aiouffd.Checkpointer(region.monitor, place) as layers:
            assert region[5] == 1
            region[7 * PAGE] = 3
            assert layers.take_sync().bytes <= 2 * (64 << 10)  # of its source nothing is fetched
        with aiouffd.open(layers.last or "") as other:
            assert other[:] == region[:]


def test_layers_are_written_and_gone_on_from(tmp_path: Path) -> None:
    """Each is whole; the first of another program takes what has not changed from the last of this one."""
    play(written, str(tmp_path))


def test_a_layer_that_fails_does_not_end_those_behind_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also by an error that is the system's: it is logged and told, until one is written."""

    class Failing:
        """A Monitor."""

        tries = 0

        def snapshot_sync(self, *_: object) -> None:
            self.tries += 1
            if self.tries == 1:
                raise OSError(errno.EMFILE, "Too many open files")

    monitor: Any = Failing()
    with aiouffd.Checkpointer(monitor, tmp_path, every=0.001) as layers:
        eventually(lambda: bool(layers.last), expected=True)
    assert layers.error is None
    assert caplog.messages == [f"a layer of {tmp_path} could not be written: [Errno 24] Too many open files"]


class Writer:
    """A Monitor: it writes empty layers of these names, and no name twice."""

    def __init__(self) -> None:
        self.written = list[str]()
        self.fails = False

    def snapshot_sync(self, place: str, _base: str | None) -> None:
        """Write one; its answer may be lost."""
        with Path(place).open("xb"):
            self.written.append(Path(place).stem)
        if self.fails:
            raise PagerDiedError("the worker died")


def test_a_layer_whose_answer_was_lost(tmp_path: Path) -> None:
    """It is a layer: the next one has another name."""
    monitor: Any = Writer()
    layers = aiouffd.Checkpointer(monitor, tmp_path)
    monitor.fails = True
    with pytest.raises(PagerDiedError):
        layers.take_sync()
    monitor.fails = False
    layers.take_sync()
    assert monitor.written == ["0000000001", "0000000002"]
    assert layers.error is None


def test_old_layers_that_cannot_be_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The new one is written all the same."""
    monitor: Any = Writer()
    layers = aiouffd.Checkpointer(monitor, tmp_path, grace=0)
    layers.take_sync()  # an empty manifest is none, and so nothing is collected
    assert (layers.error, Path(layers.last or "").stem) == (None, "0000000001")
    assert f"old layers of {tmp_path} could not be removed: " in caplog.text


def killed(folder: str) -> None:
    """Scenario: a program that adds to all numbers is killed without warning."""
    with aiouffd.Monitor(aiouffd.Region(SIZE)) as monitor:
        numbers = memoryview(monitor.region).cast("Q")
        with aiouffd.Checkpointer(monitor, folder, every=0.01) as layers:
            written = 0
            for step in range(1, 1 << 62):
                for at in range(0, len(numbers), PAGE // 8):
                    numbers[at] = step
                done = int(Path(layers.last).stem) if layers.last is not None else 0
                written = written if step > 1 else done
                if done >= written + 3:  # so its moment is behind the first step
                    os.kill(os.getpid(), signal.SIGKILL)


def test_the_last_layer_of_a_program_that_was_killed(tmp_path: Path) -> None:
    """It is of one moment: a step is done up to a page, and not done behind it."""
    play(killed, str(tmp_path), status=-signal.SIGKILL)
    last = aiouffd.Checkpointer.last_of(tmp_path)
    assert last is not None
    play(gone_on, last)


def gone_on(last: str) -> None:
    """Scenario: the layer is read."""
    with aiouffd.open(last) as region, memoryview(region).cast("Q") as numbers:
        steps = [numbers[at] for at in range(0, len(numbers), PAGE // 8)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] - steps[-1] in (0, 1)
    assert steps[0]


def test_what_cannot_be(tmp_path: Path) -> None:
    """Times and numbers that make no sense."""
    monitor = aiouffd.Monitor(aiouffd.Region(PAGE))
    with pytest.raises(ValueError, match="every="):
        aiouffd.Checkpointer(monitor, tmp_path, every=0)
    with pytest.raises(TypeError, match="every= is a number of seconds"):
        aiouffd.Checkpointer(monitor, tmp_path, every="1 s")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep="):
        aiouffd.Checkpointer(monitor, tmp_path, keep=0)
    options: dict[str, Any] = {"evry": 1}
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'; it takes codec, level"):
        aiouffd.Checkpointer(monitor, tmp_path, **options)
