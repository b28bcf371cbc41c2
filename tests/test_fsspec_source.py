"""Files of fsspec filesystems."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import threading
from typing import TYPE_CHECKING, Any

import aiohttp
import fsspec
import odd_http
import pytest
import pytest_asyncio
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

import aiouffd
from aiouffd.sources import fsspec_source
from aiouffd.store.cached_source import CachedSource
from aiouffd.store.filesystem import CachedFileSystem
from aiouffd.store.resolve import as_source
from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

DATA = odd_http.DATA


@pytest.fixture
def memory() -> Iterator[Any]:
    """A filesystem in this process, whose methods are plain functions."""
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/file", DATA)
    yield filesystem
    filesystem.rm("/file")


@pytest.fixture
def server() -> Iterator[odd_http.Odd]:
    """A web server, for the filesystem whose methods are coroutines."""
    with odd_http.serving() as server:
        yield server


@pytest_asyncio.fixture
async def opened() -> AsyncIterator[Callable[..., aiouffd.FsspecSource]]:
    """Makes sources, which are closed however a test ends: a session that is left open keeps the interpreter."""
    async with contextlib.AsyncExitStack() as stack:

        def make(*arguments: Any) -> aiouffd.FsspecSource:
            source = aiouffd.FsspecSource(*arguments)
            stack.push_async_callback(source.aclose)
            return source

        yield make


async def sized(source: aiouffd.FsspecSource) -> int:
    """Return the size, which is asked for in a thread."""
    return await asyncio.to_thread(getattr, source, "size")


class Hub(MemoryFileSystem):  # type: ignore[misc]
    """Tells of one file as that of hf:// does: it lists all of the folder, or is asked for the last commit, too."""

    cachable = False
    expand_info = None

    def __init__(self) -> None:
        super().__init__()
        self.listed, self.asked = 0, 0

    def info(self, path: str, *, expand_info: bool | None = None, **_: Any) -> dict[str, Any]:
        """Count."""
        self.listed, self.asked = self.listed + (not expand_info), self.asked + 1
        return {"name": path, "type": "file", "size": len(DATA), "blob_id": "b"}


async def test_no_folder_is_listed_to_tell_of_a_file(memory: Any, opened: Any, tmp_path: Path) -> None:
    """It may have thousands of files, and each read looks whether its own has changed."""
    hub = Hub()
    hub.store, source = memory.store, opened(hub, "/file")
    assert await sized(source) == len(DATA)
    for at in (0, 5):
        assert await source.read(at, 9) == DATA[at : at + 9]
    assert (hub.listed, hub.asked) == (0, 3)
    cached = await asyncio.to_thread(CachedFileSystem, hub, cache_storage=aiouffd.ChunkCache(tmp_path, 8 << 20))
    assert await asyncio.to_thread(cached.cat_file, "/file", 5, 9) == DATA[5:9]
    assert (hub.listed, hub.asked) == (0, 5)


@pytest.mark.parametrize("method", ["cat_file", "info"])
async def test_a_call_without_an_answer_keeps_nobody_waiting(
    method: str, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up in time, so that who asks for the same chunk again does not wait for that call."""
    hub = Hub()
    hub.store = memory.store
    source = CachedSource(aiouffd.FsspecSource(hub, "/file"), aiouffd.ChunkCache(tmp_path, 8 << 20))
    await source.prepare()
    source.begin(0.2, None, lambda: None)
    call, end, first = getattr(hub, method), threading.Event(), threading.Lock()

    def answering(*arguments: Any, **named: Any) -> Any:
        if first.acquire(blocking=False):
            end.wait()
        return call(*arguments, **named)

    monkeypatch.setattr(hub, method, answering)
    with pytest.raises(aiouffd.SourceTimeoutError, match="has not answered in time"):
        await asyncio.wait_for(source.read(5, 10), 60)
    source.begin(60, None, lambda: None)
    assert bytes(await asyncio.wait_for(source.read(5, 10), 60)) == DATA[5:15]
    end.set()
    await source.aclose()


async def test_a_filesystem_of_functions(memory: Any, opened: Any) -> None:
    """Is read in threads, many at once."""
    source = opened(memory, "/file")
    assert await sized(source) == len(DATA)
    threads = set()
    original = memory.cat_file

    def noted(*arguments: Any, **named: Any) -> Any:
        threads.add(threading.current_thread().name)
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "cat_file", noted)
        found = await asyncio.gather(*(source.read(at, 999) for at in range(0, 100_000, 5_000)))
    assert found == [DATA[at : at + 999] for at in range(0, 100_000, 5_000)]
    assert threads == {"aiouffd-fsspec"}


async def test_a_filesystem_of_coroutines(server: odd_http.Odd, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is read on fsspec's loop, since some block it (s3fs reads files to make a client); no more than the range."""
    loops = []
    original = HTTPFileSystem._cat_file

    async def cat_file(self: Any, *arguments: Any, **named: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        return await original(self, *arguments, **named)

    monkeypatch.setattr(HTTPFileSystem, "_cat_file", cat_file)
    asynchronous = HTTPFileSystem(asynchronous=True, loop=asyncio.get_running_loop(), skip_instance_cache=True)
    source = opened(server.url)
    assert await sized(source) == len(DATA)
    for each in (source, opened(asynchronous, server.url)):
        assert await each.read(1000, 500) == DATA[1000:1500]
    assert loops == [fsspec.asyn.get_loop()] * 2
    ranges = [headers["range"] for method, headers in server.requests if method == "GET"]
    assert ranges == ["bytes=1000-1499"] * 2


async def test_a_filesystem_that_opens_files(opened: Any) -> None:
    """And has no way to read a range (hf:// for example): no more is asked for than the range."""
    asked = []

    class File(AbstractBufferedFile):  # type: ignore[misc]
        def _fetch_range(self, start: int, end: int) -> bytes:
            asked.append((start, end))
            return DATA[start:end]

    class Filesystem(AbstractFileSystem):  # type: ignore[misc]
        def info(self, path: str, **_options: Any) -> dict[str, Any]:
            return {"name": path, "size": len(DATA), "type": "file"}

        def _open(self, path: str, mode: str = "rb", **options: Any) -> File:
            return File(self, path, mode, **{name: each for name, each in options.items() if name != "autocommit"})

    source = opened(Filesystem(), "file")
    await sized(source)
    assert await source.read(1000, 500) == DATA[1000:1500]
    assert asked == [(1000, 1500)]


@pytest.mark.parametrize("chain", ["simplecache", "dir"])
async def test_a_filesystem_around_one_of_coroutines(opened: Any, tmp_path: Path, chain: str) -> None:
    """Is read in threads: the coroutines belong to a loop of its own."""
    (tmp_path / "data.bin").write_bytes(DATA)
    with serving(tmp_path) as url:
        if chain == "dir":
            filesystem = fsspec.filesystem(chain, path=url, target_protocol="http")
            source = opened(filesystem, "data.bin")
        else:
            options = {"cache_storage": str(tmp_path / "kept"), "target_protocol": "http"}
            source = opened(fsspec.filesystem(chain, **options), f"{url}/data.bin")
        assert await sized(source) == len(DATA)
        assert await source.read(1000, 500) == DATA[1000:1500]
        assert source._here.result()[2] is None


async def test_one_look_for_many_reads(server: odd_http.Odd, opened: Any) -> None:
    """Those that end while the filesystem is asked for the version share the next look."""
    source = opened(server.url)
    await sized(source)
    server.requests.clear()
    found = await asyncio.gather(*(source.read(at, 10) for at in range(40)))
    assert found == [DATA[at : at + 10] for at in range(40)]
    assert 1 <= sum(method == "HEAD" for method, _ in server.requests) < 40


async def test_a_change_is_an_error(server: odd_http.Odd, opened: Any) -> None:
    """Of a file of the same size; also for reads that are under way, and a look that has begun before they end."""
    source = opened(server.url)
    await sized(source)
    await source.read(0, 10)
    server.change()
    found = await asyncio.gather(*(source.read(at, 10) for at in range(3)), return_exceptions=True)
    assert all(isinstance(error, aiouffd.SourceError) and "has changed" in str(error) for error in found)
    assert {error.offset for error in found if isinstance(error, aiouffd.SourceError)} == {0, 1, 2}


async def test_a_look_begins_after_the_read(memory: Any, opened: Any) -> None:
    """A file that changes between a look and the end of a read is noticed by that read."""
    source = opened(memory, "/file")
    await sized(source)
    began, go_on = threading.Event(), threading.Event()
    original = memory.cat_file

    def slow(path: str, **named: Any) -> Any:
        if named["start"] == 0:
            began.set()
            go_on.wait(60)
        return original(path, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "cat_file", slow)
        first = asyncio.ensure_future(source.read(0, 10))
        await asyncio.to_thread(began.wait, 60)
        assert await source.read(50, 10) == DATA[50:60]
        await asyncio.to_thread(memory.pipe, "/file", bytes(len(DATA)))
        go_on.set()
        with pytest.raises(aiouffd.SourceError, match="has changed"):
            await first


async def test_canceling(memory: Any, opened: Any) -> None:
    """One of several reads ends; the others have their bytes."""
    source = opened(memory, "/file")
    await sized(source)
    reads = [asyncio.ensure_future(source.read(at, 10)) for at in range(5)]
    await asyncio.sleep(0)
    reads[2].cancel()
    found = await asyncio.gather(*reads, return_exceptions=True)
    assert isinstance(found.pop(2), asyncio.CancelledError)
    assert found == [DATA[at : at + 10] for at in (0, 1, 3, 4)]


async def test_a_look_that_hangs(memory: Any, opened: Any) -> None:
    """It costs the reads that wait for it, and not those that come later: a lost connection has no answer."""
    source = opened(memory, "/file")
    await sized(source)
    hangs, go_on = threading.Event(), threading.Event()
    original = memory.info

    def info(path: str, **named: Any) -> Any:
        if not hangs.is_set():
            hangs.set()
            go_on.wait(60)
        return original(path, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "info", info)
        patch.setattr(fsspec_source, "_PATIENCE", 0.01, raising=False)
        lost = asyncio.ensure_future(source.read(0, 10))
        await asyncio.to_thread(hangs.wait, 60)
        lost.cancel()
        async with asyncio.timeout(60):
            assert await source.read(10, 10) == DATA[10:20]
        go_on.set()


@pytest.mark.usefixtures("memory")
async def test_a_filesystem_that_is_reached_at_the_second_try(opened: Any) -> None:
    """A read that failed is repeated by the engine, which is of use only if that connects again."""
    source = opened("memory:///file")
    original, tries = fsspec.core.url_to_fs, []

    def url_to_fs(*arguments: Any, **named: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionResetError("not today")
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsspec.core, "url_to_fs", url_to_fs)
        with pytest.raises(ConnectionResetError):
            await source.read(0, 10)
        assert await source.read(0, 10) == DATA[:10]


async def test_what_cannot_be_read(memory: Any, server: odd_http.Odd, opened: Any) -> None:
    """What is not there, no file, or gone meanwhile; what ends too early; what a server refuses."""
    for source in (opened(memory, "/none"), opened(memory, "/")):
        with pytest.raises(aiouffd.SourceError, match=r"FileNotFoundError|no file"):
            await sized(source)
    source = opened(memory, "/file")
    await sized(source)
    with pytest.raises(aiouffd.ShortReadError, match="gave 3 bytes of 10"):
        await source.read(len(DATA) - 3, 10)
    memory.pipe("/other", DATA)
    gone = opened(memory, "/other")
    await sized(gone)
    memory.rm("/other")
    with pytest.raises(aiouffd.SourceError, match="FileNotFoundError"):
        await gone.read(0, 10)
    far = opened(server.url)
    await sized(far)
    server.failures = 1
    with pytest.raises(aiohttp.ClientResponseError, match="503"):  # no SourceError: it is tried again
        await far.read(0, 10)
    assert await far.read(0, 10) == DATA[:10]


def test_what_is_no_file_of_a_filesystem(memory: Any) -> None:
    """A path where none is needed, or none where one is."""
    for arguments in ((memory,), ("memory://file", "/file")):
        with pytest.raises(TypeError, match="a URL, or a filesystem and a path"):
            aiouffd.FsspecSource(*arguments)


def test_it_travels(memory: Any, tmp_path: Path) -> None:
    """With the version that it was opened with, by fsspec's own pickles."""
    (tmp_path / "file").write_bytes(DATA)
    for source in (
        aiouffd.FsspecSource(memory, "/file"),
        aiouffd.FsspecSource(f"local://{tmp_path}/file", auto_mkdir=True),
        aiouffd.FsspecSource("simplecache::memory://file", simplecache={"cache_storage": str(tmp_path / "cache")}),
    ):
        assert source.size == len(DATA)
        again = pickle.loads(pickle.dumps(source))
        assert again._pinned == source._pinned
        assert repr(again) == repr(source)
        assert bytes(asyncio.run(again.read(7, 9))) == DATA[7:16]


def test_memory_of_another_process(memory: Any) -> None:
    """Files that are not there, where a source arrives, are said to be elsewhere."""
    sources = [aiouffd.FsspecSource(memory, "/file"), aiouffd.FsspecSource("memory://file")]
    assert [source.size for source in sources] == [len(DATA)] * 2
    arriving = [pickle.dumps(source) for source in sources]
    memory.rm("/file")
    for data in arriving:
        with pytest.raises(aiouffd.SourceError, match="those of one process"):
            pickle.loads(data)
    memory.pipe("/file", DATA)


def test_names_of_a_version(server: odd_http.Odd, memory: Any) -> None:
    """A strong ETag is one, for a cache as well; a time is none. Secrets are not in it."""
    one, other = aiouffd.FsspecSource(server.url), aiouffd.FsspecSource(server.url, headers={"X": "secret"})
    assert [one.cache_identity, one.validator] == [None, None]
    assert one.size == other.size == len(DATA)
    assert one.validator == other.validator == '"v1"'
    assert one.cache_identity != other.cache_identity
    assert "secret" not in str(other.cache_identity)
    source = aiouffd.FsspecSource(memory, "/file")
    assert source.size == len(DATA)
    assert [source.cache_identity, source.validator] == [None, None]


def test_a_filesystem_that_names_no_version(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and not asked again."""

    class Silent(MemoryFileSystem):  # type: ignore[misc]
        protocol = "silent"
        looks = 0

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            type(self).looks += 1
            return {"name": path, "size": len(DATA), "type": "file"}

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            return DATA[start:end]

    source = aiouffd.FsspecSource(Silent(), "/file")
    assert source.size == len(DATA)
    assert "names no version" in caplog.text
    assert asyncio.run(source.read(3, 4)) == DATA[3:7]
    assert Silent.looks == 1


def test_its_repr() -> None:
    """No password and no query."""
    assert repr(aiouffd.FsspecSource("sftp://me:secret@host/a?sig=secret")) == "FsspecSource('sftp://host/a')"


def test_urls_of_open() -> None:
    """Those that only fsspec knows, and chains; others are what they were."""
    assert isinstance(as_source("hf://org/model/file"), aiouffd.FsspecSource)
    assert isinstance(as_source("simplecache::http://host/file"), aiouffd.FsspecSource)
    source = as_source("sftp://host/file", options={"username": "me"})
    assert isinstance(source, aiouffd.FsspecSource)
    assert source._options == {"username": "me"}
    assert isinstance(as_source("http://host/file"), aiouffd.ObjectSource)
    with pytest.raises(aiouffd.SourceError, match=r"'gopher' is unknown.*fsspec"):
        as_source("gopher://host/file")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "fsspec", None)
        with pytest.raises(aiouffd.SourceError, match=r"fsspec"):
            as_source("hf://org/model/file")
