"""Sources: the bytes they give, what they do at their end, and how they travel."""

from __future__ import annotations

import asyncio
import ctypes
import http.server
import mmap
import os
import pickle
import random
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from web import serving

import aiouffd
from aiouffd.pager.process.travel import pack, unpack
from aiouffd.sources.resolve import as_source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1_000_003
DATA = random.Random(11).randbytes(SIZE)


def travelled(source: Any) -> Any:
    """Return the source as it arrives in the pager."""
    data, descriptors = pack(source)
    return unpack(data, [os.dup(item.fd) for item in descriptors])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the data."""
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page server with the data."""
    directory = tmp_path_factory.mktemp("served")
    (directory / "data.bin").write_bytes(DATA)
    (directory / "empty.bin").write_bytes(b"")
    with serving(directory) as url:
        yield url


def at(address: int | None, length: int) -> bytes:
    """Return what lies at an address."""
    assert address is not None
    return ctypes.string_at(address, length)


_places = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 300_000))


@given(_places)
def test_a_buffer_is_always_at_hand(place: tuple[int, int]) -> None:
    """The same bytes by address, by view, and after the journey; the journey copies once."""
    offset, length = place[0], min(place[1], SIZE - place[0])
    for source in (BUFFER, TRAVELLED):
        assert source.size == SIZE
        assert at(source.locate(offset, length), length) == DATA[offset : offset + length]
        assert bytes(source.read_nowait(offset, length)) == DATA[offset : offset + length]


BUFFER = aiouffd.BufferSource(DATA)
TRAVELLED = travelled(BUFFER)


def test_a_buffer_travels_in_one_memfd() -> None:
    """However often it travels: one sealed copy; a plain pickle carries the bytes."""
    first, second = pack(BUFFER)[1][0].fd, pack(BUFFER)[1][0].fd
    assert first == second
    assert len(pack(BUFFER)[0]) < 1000
    assert bytes(pickle.loads(pickle.dumps(BUFFER)).read_nowait(0, SIZE)) == DATA
    empty = travelled(aiouffd.BufferSource(b""))
    assert empty.size == 0


def test_a_buffer_must_be_contiguous() -> None:
    """Half of every second byte is refused, not misread."""
    with pytest.raises(ValueError, match="contiguous"):
        aiouffd.BufferSource(memoryview(DATA)[::2])


async def test_a_file_by_address_and_by_thread(path: Path) -> None:
    """Resident bytes are located in its mapping; a read gives them too; both after the journey as well."""
    for source in (aiouffd.FileSource(path), travelled(aiouffd.FileSource(path))):
        assert source.size == SIZE
        for offset, length in ((0, 4096), (5, 1), (999_424, 579), (0, SIZE), (4097, 100_000)):
            assert at(source.locate(offset, length), length) == DATA[offset : offset + length]
            assert bytes(await source.read(offset, length)) == DATA[offset : offset + length]
        assert source.hole(0, SIZE) == 0
        await source.aclose()


async def test_bytes_that_are_not_in_memory_are_not_located(path: Path) -> None:
    """What the page cache has dropped would block the loop: it is read by a thread."""
    source = aiouffd.FileSource(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if source.locate(0, SIZE) is not None:
        pytest.skip("this file system keeps its pages")
    assert bytes(await source.read(0, SIZE)) == DATA
    assert source.locate(0, SIZE) is not None
    await source.aclose()


async def test_single_pages_of_a_file(path: Path) -> None:
    """They are read where that does not wait; else it is asked whether they are resident; nothing behind a cut."""
    source = aiouffd.FileSource(path)
    for offset, length in ((0, 4096), (40_960, 16_384), (8192, 65_536), (8192, 4096)):
        assert at(source.page(offset, length), length) == DATA[offset : offset + length]
    scratch = source.page(0, 4096)
    assert source.page(4096, 4096) == scratch
    assert source.page(0, 65_536) == source.locate(0, 65_536)
    os.truncate(path, 5000)
    assert source.page(4096, 4096) is None
    assert source.page(8192, 4096) is None
    assert at(source.page(0, 4096), 4096) == DATA[:4096]
    await source.aclose()


async def test_bytes_that_are_expected_come_to_hand(path: Path) -> None:
    """A thread reads what is announced, as far as the file goes; what was announced once is not read twice."""
    source = aiouffd.FileSource(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if source.locate(0, SIZE) is not None:
        pytest.skip("this file system keeps its pages")
    source.expect(0, 4 * SIZE)
    source.expect(4096, SIZE)
    await asyncio.to_thread(source._threads.shutdown)  # it has done all then
    assert [item[:2] for item in source._populated] == [(0, SIZE)]
    assert at(source.locate(5, SIZE - 5), SIZE - 5) == DATA[5:]
    # Not for long, and not behind the end of a file that is cut: it is asked again then.
    piece = source._populated[0]
    source._populated = (piece._replace(when=0.0),)
    assert at(source.locate(0, SIZE), SIZE) == DATA
    source._populated = (piece._replace(when=float("inf")),)
    os.truncate(path, 5000)
    assert source.locate(0, SIZE) is None
    await source.aclose()


def test_threads_bring_to_hand_while_the_loop_looks(path: Path) -> None:
    """Neither is disturbed."""
    source = aiouffd.FileSource(path)
    done = threading.Event()

    def populate() -> None:
        while not done.is_set():
            source._populate(0, 4096)

    threads = [threading.Thread(target=populate) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(300_000):  # one in some 200 failed
            assert source._piece(8192, 16384) is None
    finally:
        sys.setswitchinterval(interval)
        done.set()
        for thread in threads:
            thread.join()


def test_holes_are_not_brought_to_hand() -> None:
    """In tmpfs they would take memory, which stays the file's."""
    page = mmap.PAGESIZE
    fd = os.memfd_create("sparse", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, 64 * page)
        for at_page in (3, 4, 9):
            os.pwrite(fd, b"data", at_page * page)
        source = aiouffd.FileSource(f"/proc/self/fd/{fd}")
        blocks = os.fstat(fd).st_blocks
        source.expect(page, 63 * page)
        source._threads.shutdown()
        assert os.fstat(fd).st_blocks == blocks
        assert [item[:2] for item in source._populated] == [(3 * page, 5 * page), (9 * page, 10 * page)]
    finally:
        os.close(fd)


def test_what_is_expected_needs_no_thread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a hint: where none can be started (RLIMIT_NPROC), nothing fails."""

    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    source = aiouffd.FileSource(path)
    monkeypatch.setattr(threading.Thread, "start", refused)
    source.expect(0, SIZE)


async def test_a_file_that_mincore_is_silent_about(path: Path) -> None:
    """To others than its owner mincore tells nothing: RWF_NOWAIT is asked instead."""
    source = aiouffd.FileSource(path)
    source._tells = False
    assert source.locate(0, 4096) is None
    assert bytes(source.read_nowait(4096, 4096) or b"") == DATA[4096:8192]
    await source.aclose()


async def test_a_file_that_was_cut(path: Path) -> None:
    """ShortReadError, not zeros, and no hole either."""
    source = aiouffd.FileSource(path)
    os.truncate(path, 5000)
    with pytest.raises(aiouffd.ShortReadError):
        await source.read(4096, 4096)
    assert source.hole(8192, 4096) == 0
    await source.aclose()


def test_a_page_that_was_cut_in_two_is_not_located(path: Path) -> None:
    """The rest of a cut file's last page would be zeros in its mapping: it is read, which fails, instead."""
    source = aiouffd.FileSource(path)
    assert source.locate(4096, 4096) is not None
    os.truncate(path, 5000)
    assert source.locate(4096, 4096) is None
    assert source.locate(0, 4096) is not None


def test_a_buffer_that_is_served_cannot_be_resized() -> None:
    """Its address has been given away."""
    data = bytearray(4096)
    source = aiouffd.BufferSource(data)
    with pytest.raises(BufferError):
        data.extend(bytes(1 << 20))
    assert source.size == 4096


def test_holes_of_a_sparse_file(tmp_path: Path) -> None:
    """What SEEK_HOLE finds; data is never a hole."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 << 20)
        file.seek(1 << 20)
        file.write(b"data" * 1024)
    source = aiouffd.FileSource(path)
    assert source.hole(0, 8 << 20) == 1 << 20
    assert source.hole(4096, 4096) == 4096
    assert source.hole(1 << 20, 4096) == 0
    assert source.hole((1 << 20) + 4096, 8 << 20) == (7 << 20) - 4096


def test_a_file_stays_the_one_that_was_opened(path: Path) -> None:
    """Another that takes its name changes nothing, not even on the journey."""
    source = aiouffd.FileSource(path)
    other = path.with_suffix(".new")
    other.write_bytes(b"other")
    other.rename(path)
    assert travelled(source).size == source.size == SIZE
    assert pickle.loads(pickle.dumps(source)).size == 5  # a plain pickle has only the path


@pytest.mark.parametrize("name", ["missing", "."])
def test_files_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    """SourceError with the path; a directory is no file."""
    with pytest.raises(aiouffd.SourceError, match=str(tmp_path)):
        aiouffd.FileSource(tmp_path / name)


async def test_objects_over_http(url: str) -> None:
    """Size, ranges and the end; the size travels along."""
    source = aiouffd.ObjectSource(f"{url}/data.bin")
    await source.prepare()
    assert source.size == SIZE
    for offset, length in ((0, 1), (999_424, 579), (123_456, 300_000)):
        assert bytes(await source.read(offset, length)) == DATA[offset : offset + length]
    again = travelled(source)
    assert again._size == SIZE
    assert bytes(await again.read(7, 7)) == DATA[7:14]
    with pytest.raises(aiouffd.SourceError):
        await source.read(SIZE - 1, 100)


async def test_64_ranges_at_once(url: str) -> None:
    """Concurrent reads do not disturb each other."""
    source = aiouffd.ObjectSource(f"{url}/data.bin")
    places = [(n * 4096, 4096) for n in range(64)]
    got = await asyncio.gather(*(source.read(*place) for place in places))
    assert [bytes(data) for data in got] == [DATA[offset : offset + length] for offset, length in places]


async def test_an_object_that_changes_is_an_error(tmp_path: Path) -> None:
    """No mixture of two versions: the ETag is held against the server."""
    (tmp_path / "x").write_bytes(bytes(10000))
    with serving(tmp_path) as url:
        source = aiouffd.ObjectSource(f"{url}/x")
        await source.prepare()
        assert bytes(await source.read(0, 10)) == bytes(10)
        (tmp_path / "x").write_bytes(bytes([1]) * 10000)
        with pytest.raises(aiouffd.SourceError, match="has changed"):
            await source.read(0, 10)


async def test_an_encoded_url_with_a_query_arrives_as_it_was_given(url: str) -> None:
    """Signed URLs have a query, and names have blanks."""
    source = aiouffd.ObjectSource(f"{url}/data%2Ebin?signature=a%2Fb&expires=1")
    await source.prepare()
    assert bytes(await source.read(5, 5)) == DATA[5:10]


def test_passwords_are_not_shown() -> None:
    """Neither in a log nor in an error."""
    assert "secret" not in repr(aiouffd.ObjectSource("https://user:secret@host/x?token=secret"))


def test_as_source(path: Path) -> None:
    """Paths, URLs, buffers and sources; an unknown scheme is said so."""
    assert isinstance(as_source(str(path)), aiouffd.FileSource)
    assert isinstance(as_source(path), aiouffd.FileSource)
    assert isinstance(as_source(path.as_uri()), aiouffd.FileSource)
    assert isinstance(as_source(bytearray(5)), aiouffd.BufferSource)
    assert isinstance(as_source("s3://bucket/key"), aiouffd.ObjectSource)
    zeros = aiouffd.ZeroSource(5)
    assert as_source(zeros) is zeros
    with pytest.raises(aiouffd.SourceError, match="gopher"):
        as_source("gopher://x/y")


async def test_zeros() -> None:
    """All of it is a hole."""
    source = aiouffd.ZeroSource(10000)
    assert source.hole(4096, 100) == 100
    assert await source.read(5, 7) == bytes(7)


class _Refuses(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(400)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


def test_signatures_are_not_shown() -> None:
    """Neither the query of a signed URL nor a password is in an error, which goes to logs, and to clients."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://someone:hidden@127.0.0.1:{server.server_port}/a/b.mem?signature=hidden"
            with pytest.raises(aiouffd.SourceError, match="400 Bad Request") as caught:
                _ = aiouffd.ObjectSource(url, timeout=2).size
        finally:
            server.shutdown()
            thread.join()
    assert "hidden" not in str(caught.value)
