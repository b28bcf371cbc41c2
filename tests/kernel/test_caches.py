"""Memory over a `ChunkCache`: by each engine, by processes that are killed, on a disk that is full, and by a server."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from cached import MIB, block
from scenario import play
from served import Serve, hand_over

import aiouffd
from aiouffd.cli import main
from aiouffd.store import create_sync
from examples.page_server import PageServer

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 3 * MIB + 5000
DATA = b"".join(map(block, range(SIZE // 4096 + 1)))[:SIZE]
LIMIT = 64 * MIB


class Web:
    """A web server for the files of a folder, in a thread. `url` is that of the file `image`, `server` counts."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.server = PageServer(folder, **options)
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self._ready, self._end = threading.Event(), threading.Event()

    async def _serve(self) -> None:
        listening = await self.server.serve("127.0.0.1", 0)
        async with listening:
            self.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/image"
            self._ready.set()
            await asyncio.to_thread(self._end.wait)

    def __enter__(self) -> Web:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file to serve."""
    (tmp_path / "image").write_bytes(DATA)
    return tmp_path / "image"


def engine_of(name: str) -> Any:
    """Return an engine."""
    return {"shared": None, "thread": aiouffd.InThread}[name]


def touch_all(url: str, cache: str, name: str, readahead: int) -> None:
    """Scenario: pages at random, then all."""
    made = engine_of(name)
    kept = aiouffd.ChunkCache(cache, LIMIT)
    with aiouffd.open(url, engine=made and made(), readahead=readahead, cache=kept) as region:
        pages = list(range(SIZE // 4096))
        random.Random(readahead).shuffle(pages)
        for page in pages[:400]:
            assert region[page * 4096 : page * 4096 + 8] == DATA[page * 4096 : page * 4096 + 8]
        assert bytes(region) == DATA
        statistics = region.monitor.statistics()
        assert statistics.source_errors == 0
        assert statistics.pages_zero >= 100


@pytest.mark.parametrize("readahead", [0, 2 << 20])
@pytest.mark.parametrize("name", ["shared", "thread"])
@pytest.mark.parametrize("kind", ["object", "snapshot"])
def test_cold_and_warm(image: Path, tmp_path: Path, kind: str, name: str, readahead: int) -> None:
    """The right bytes; who comes second fetches none."""
    if kind == "snapshot":
        create_sync(DATA, tmp_path / "x.snap", codec="none")
    with Web(image.parent) as web:
        url = web.url if kind == "object" else web.url.replace("image", "x.snap")
        play(touch_all, url, str(tmp_path / "cache"), name, readahead)
        assert web.server.bytes_sent > MIB
        before = web.server.bytes_sent
        play(touch_all, url, str(tmp_path / "cache"), name, readahead)
        assert web.server.bytes_sent - before < 64 << 10  # the first byte, or manifest and index
        assert aiouffd.ChunkCache(tmp_path / "cache", LIMIT).verify()[1] == 0


TOUCH = """
import sys
import aiouffd
cache = aiouffd.ChunkCache(sys.argv[2], int(sys.argv[3]))
with aiouffd.open(sys.argv[1], cache=cache, readahead=0) as region:
    print("open", flush=True)
    sys.stdin.readline()
    sys.stdout.buffer.write(region[:])
"""


def toucher(url: str, cache: Path) -> subprocess.Popen[bytes]:
    """Start a process that reads all of an object when it is told to."""
    return subprocess.Popen(
        [sys.executable, "-c", TOUCH, url, str(cache), str(LIMIT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_many_processes_that_begin_at_once(image: Path, tmp_path: Path) -> None:
    """Each chunk is fetched once."""
    with Web(image.parent, latency=0.005) as web:
        processes = [toucher(web.url, tmp_path / "cache") for _ in range(4)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
        before = web.server.bytes_sent
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert [process.communicate(timeout=60)[0] for process in processes] == [DATA] * 4
        assert web.server.bytes_sent - before == SIZE
    counted = aiouffd.ChunkCache(tmp_path / "cache", LIMIT).statistics()
    assert counted["bytes"] == SIZE
    assert counted["waits"] > 0


def killed_at(pids: list[int], moment: float) -> None:
    """Kill processes a little later."""
    threading.Event().wait(moment)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def killed(url: str, cache: str, rounds: int) -> None:
    """Scenario: this process's keeper and worker are killed again and again while they fetch, and read on."""
    for number in range(rounds):
        with aiouffd.open(url, readahead=0, cache=aiouffd.ChunkCache(cache, LIMIT), engine=aiouffd.Pager()) as region:
            monitor: Any = region.monitor
            killer = threading.Thread(target=killed_at, args=(monitor.pids[1:], 0.002 * number))
            killer.start()
            assert bytes(region) == DATA
            killer.join()
        aiouffd.ChunkCache(cache, LIMIT).trim(0 if number % 3 == 0 else LIMIT)


def test_fetchers_that_are_killed(image: Path, tmp_path: Path) -> None:
    """Their successors go on; the cache has no wrong byte."""
    with Web(image.parent) as web:
        play(killed, web.url, str(tmp_path / "cache"), 4, deadline=60)
        assert aiouffd.ChunkCache(tmp_path / "cache", LIMIT).verify()[1] == 0
        play(touch_all, web.url, str(tmp_path / "cache"), "shared", 0)


def on_a_full_disk(url: str, cache: str) -> None:
    """Scenario: no file may be longer than some pages."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, 3 * MIB))
    touch_all(url, cache, "thread", 0)


def test_a_disk_that_is_full(image: Path, tmp_path: Path) -> None:
    """It is served without."""
    with Web(image.parent) as web:
        output, errors = play(on_a_full_disk, web.url, str(tmp_path / "cache"))
    assert errors.count("nothing can be added to it: File too large") == 1, output + errors
    assert not list((tmp_path / "cache").glob("*.segment"))


def of_a_client(path: str) -> None:
    """Scenario: a microVM's memory."""
    region, _connection, _uffd = hand_over(path, SIZE // 4096 * 4096)
    assert bytes(region) == DATA[: SIZE // 4096 * 4096]


def test_a_server_with_a_cache(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its second client, and that of another server, fetch nothing; the commands look at it."""
    with Web(image.parent) as web:
        for _ in range(2):
            with Serve(tmp_path, web.url, "--cache", str(tmp_path / "cache"), "--cache-size", "64M") as serve:
                play(of_a_client, str(serve.path))
                play(of_a_client, str(serve.path))
                assert serve.end() == 0
        assert web.server.bytes_sent < SIZE + MIB
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    assert f"bytes      {SIZE // 4096 * 4096 // 65536 * 65536:,}"[:14] in capsys.readouterr().out
    (tmp_path / "other").mkdir(0o755)
    refused = Serve(tmp_path, web.url, "--cache", str(tmp_path / "other"), wait=False)
    assert refused.process.wait(60) == 1
    assert "others may enter this folder" in refused.said
