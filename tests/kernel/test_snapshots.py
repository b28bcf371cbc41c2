"""Memory that shows a snapshot, by each engine."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest
from scenario import eventually, play
from served import Serve
from snapshots import CHUNK, an_image, damage, packs_of

import aiouffd
from aiouffd.engine.ahead.trace import Recorder
from aiouffd.store import create_sync
from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = bytes(CHUNK) + an_image(11, 60, 4096 * 3 + 5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a snapshot."""
    place = tmp_path_factory.mktemp("made")
    create_sync(DATA, place / "x.snap")
    return place


@pytest.fixture(scope="module", params=["folder", "http"])
def place(made: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where it is."""
    if request.param == "folder":
        yield str(made / "x.snap")
    else:
        with serving(made) as url:
            yield f"{url}/x.snap"


def engine_of(name: str) -> aiouffd.Pager | aiouffd.InThread | None:
    """Return an engine."""
    if name == "pager":
        return aiouffd.Pager()
    return aiouffd.InThread() if name == "thread" else None


def touch_all(place: str, name: str, readahead: int) -> None:
    """Read it at random and in order."""
    with aiouffd.open(place, engine=engine_of(name), readahead=readahead) as region:
        order = [n * 7919 % len(DATA) for n in range(300)]
        assert [region[at] for at in order] == [DATA[at] for at in order]
        assert bytes(region) == DATA
        statistics = region.monitor.statistics()
        assert statistics.source_errors == 0
        assert statistics.pages_zero >= CHUNK // 4096


@pytest.mark.parametrize("readahead", [0, 2 << 20])
@pytest.mark.parametrize("name", ["shared", "pager", "thread"])
def test_it_is_mapped(place: str, name: str, readahead: int) -> None:
    """Any touch sees its bytes."""
    play(touch_all, place, name, readahead)


def test_in_process(place: str, loop: str) -> None:
    """A prefetch on the caller's loop."""
    play(prefetch_here, place, loop=loop)


async def prefetch_here(place: str) -> None:
    """Bring all, and look."""
    source = aiouffd.SnapshotSource(place)
    await source.prepare()
    region = aiouffd.Region(source.size)
    async with aiouffd.Monitor(region, source, engine=aiouffd.InProcess()) as monitor:
        await monitor.prefetch(0, source.size)
        assert await asyncio.to_thread(bytes, region) == DATA


@pytest.mark.parametrize("name", ["shared", "thread"])
def test_a_damaged_chunk_is_sigbus(tmp_path: Path, name: str) -> None:
    """Not a wrong byte: the toucher gets SIGBUS, and a prefetch the typed error, with object and chunk."""
    data = an_image(1, 8)
    create_sync(data, tmp_path / "x.snap", codec="none")
    (pack,) = packs_of(tmp_path)
    damage(pack, pack.stat().st_size - 5)
    output, errors = play(touch_last, str(tmp_path / "x.snap"), name, status=-signal.SIGBUS)
    assert f"StoreError {pack}, chunk " in output
    assert "it is damaged: its hash is another than the index says" in output + errors


def touch_last(place: str, name: str) -> None:
    """Prefetch all, which fails; then touch what is damaged."""
    with aiouffd.open(place, engine=engine_of(name), readahead=0) as region:
        with pytest.raises(aiouffd.StoreError) as caught:
            region.monitor.prefetch_sync(0, len(region))
        print("StoreError", caught.value, flush=True)
        assert caught.value.chunk is not None
        _ = region[caught.value.offset]


def survive(place: str) -> None:
    """Kill the worker of the pager while it serves."""
    with aiouffd.open(place, readahead=0) as region:
        for number, at in enumerate(range(0, len(DATA), 3 * 4096)):
            if number in (25, 250):
                os.kill(region.monitor.pids[1], signal.SIGKILL)
            assert region[at] == DATA[at]


def test_a_worker_that_is_killed(place: str) -> None:
    """Its successor opens the snapshot from what the first one had."""
    play(survive, place)


def replay(place: str) -> None:
    """Touch nothing, and wait for what was touched before."""
    with aiouffd.open(place) as region:
        eventually(lambda: region.monitor.statistics().pages_replay, 3)
        assert region.monitor.statistics().faults == 0
        assert bytes(region) == DATA


def test_a_recording_that_is_kept_with_it_is_replayed(tmp_path: Path) -> None:
    """Without a word, by `open`."""
    recorder = Recorder.create(tmp_path / "trace", 4096, len(DATA))
    for page in (20, 7, 300):
        recorder.note(page * 4096)
    recorder.complete()
    create_sync(DATA, tmp_path / "x.snap", trace=tmp_path / "trace")
    play(replay, str(tmp_path / "x.snap"))


def touch_served(path: str) -> None:
    """Be a client."""
    region = aiouffd.Region(-(-len(DATA) // 4096) * 4096)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)):
        assert bytes(region)[: len(DATA)] == DATA


def test_aiouffd_serve_knows_a_snapshot(place: str, tmp_path: Path) -> None:
    """Two clients share it."""
    with Serve(tmp_path, place) as serve:
        for _ in range(2):
            play(touch_served, str(serve.path))
