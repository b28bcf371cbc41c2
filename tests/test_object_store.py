"""`sources.object_store`: objects behind URLs."""

from __future__ import annotations

import asyncio
import http.server
import threading
from typing import TYPE_CHECKING

import pytest
from stored import DATA, SIZE, travelled

import aiouffd
from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page server with the data."""
    directory = tmp_path_factory.mktemp("served")
    (directory / "data.bin").write_bytes(DATA)
    (directory / "empty.bin").write_bytes(b"")
    with serving(directory) as url:
        yield url


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
