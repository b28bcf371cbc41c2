"""`sources.object_store`: objects behind URLs."""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import attrs
import odd_http
import pytest
from scenario import play
from stored import DATA, SIZE, travelled

import aiouffd
from aiouffd.engine.serve.common import is_far
from aiouffd.errors import decode_error, encode_error
from aiouffd.sources import steps
from aiouffd.sources.concat import ConcatSource
from aiouffd.sources.helped_http import HelpedHttp
from aiouffd.sources.http_answer import Validator
from aiouffd.sources.loop_http import LoopHttp
from aiouffd.sources.plain_http import PlainHttp
from aiouffd.sources.store_errors import Failure
from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEADERS: dict[str, Any] = {"client_options": {"default_headers": {"X-Token": "token"}}}
"""Options that only obstore knows."""


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
    assert again._pinned == source._pinned
    assert bytes(await again.read(7, 7)) == DATA[7:14]
    with pytest.raises(aiouffd.SourceError):
        await source.read(SIZE - 1, 100)


@pytest.mark.parametrize("options", [{}, HEADERS])
async def test_the_first_page_comes_with_the_size(url: str, options: dict[str, Any]) -> None:
    """It is at hand, also where the source has travelled to; all else has to be asked for."""
    source = aiouffd.ObjectSource(f"{url}/data.bin", **options)
    assert source.read_nowait(0, 1) is None  # nothing was asked for
    await source.prepare()
    for one in (source, travelled(source)):
        assert one.read_nowait(0, mmap.PAGESIZE) == DATA[: mmap.PAGESIZE]
        assert one.read_nowait(5, 7) == DATA[5:12]
        assert one.read_nowait(0, mmap.PAGESIZE + 1) is None
        assert one.read_nowait(mmap.PAGESIZE, 1) is None
        assert is_far(one)
        assert not ConcatSource([one]).local


async def test_no_bytes_of_a_version_that_nothing_names() -> None:
    """Nothing would notice that they are of another one than those that are read later."""
    with odd_http.serving("none") as server:
        source = aiouffd.ObjectSource(server.url)
        await source.prepare()
        assert source._witness == (0, odd_http.DATA[: mmap.PAGESIZE])
        assert source.read_nowait(0, 1) is None


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


def test_signatures_are_not_shown() -> None:
    """Neither the query of a signed URL nor a password is in an error, which goes to logs, and to clients."""
    with odd_http.serving("400") as server:
        url = server.url.replace("//", "//someone:hidden@")
        with pytest.raises(aiouffd.SourceError, match="400 Bad Request") as caught:
            _ = aiouffd.ObjectSource(url, timeout=2).size
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("client", ["obstore", "loop"])
async def test_answers_without_a_byte_are_an_error(client: str) -> None:
    """And are not asked for again, for ever."""
    with odd_http.serving("empty") as server:
        source = aiouffd.ObjectSource(server.url, timeout=5, retries=0)
        await source.prepare()
        ask_by(client, source)
        with pytest.raises(aiouffd.SourceError):
            await asyncio.wait_for(source.read(10, 100), 60)
        await source.aclose()


SIZE_OF_ODD = len(odd_http.DATA)
PLACES = ((0, 4096), (65_000, 30_000), (SIZE_OF_ODD - 100, 100))


def ask_by(client: str, source: aiouffd.ObjectSource) -> None:
    """Have a source read by one of its three ways of asking."""
    if client == "plain":
        source._client = PlainHttp(source.url, {}, 10, lambda: None)
    elif client == "loop":
        source.begin(20, 1, lambda: None)


async def read_all(source: aiouffd.ObjectSource) -> None:
    """Read some ranges, and compare."""
    try:
        assert await asyncio.to_thread(lambda: source.size) == SIZE_OF_ODD
        for offset, length in PLACES:
            assert bytes(await source.read(offset, length)) == odd_http.DATA[offset : offset + length]
    finally:
        await source.aclose()


@pytest.mark.parametrize("client", ["obstore", "loop"])
@pytest.mark.parametrize(
    "habit",
    [
        *("head 403", "head 404", "head 405", "head 501"),
        *("short", "star", "late star", "chunked", "aligned"),
        *("modified", "weak", "weak tag", "drops"),
    ],
)
async def test_valid_answers(habit: str, client: str) -> None:
    """HEAD refused; fewer bytes than were asked for, or more; no total, no length; weak validators; one that breaks."""
    with odd_http.serving(habit) as server:
        server.failures = 1
        source = aiouffd.ObjectSource(server.url, timeout=20)
        ask_by(client, source)
        await read_all(source)


@pytest.mark.parametrize("client", ["obstore", "loop"])
@pytest.mark.parametrize(
    ("habit", "complaint"),
    [
        ("wrong offset", r"was asked for bytes 65000-94999, and answered bytes 0-29999"),
        ("no content-range", "without Range requests"),
        ("multipart", "without Range requests"),
        ("late 200", "without Range requests"),
        ("other total", "has changed"),
        ("compressed", "compresses its answers"),
        ("403", r"access was refused \(403\).*signed URL has expired"),
        ("404", r"no such object \(404\)"),
        ("410", r"no such object \(410\)"),
        ("400", "400 Bad Request"),
        ("501", "501 Not Implemented"),
        ("ends early", "the connection broke"),
        ("enormous", "9223372036854775808 bytes, more than any file"),
    ],
)
async def test_answers_that_mean_no_bytes(habit: str, complaint: str, client: str) -> None:
    """Each is an error that says what is wrong, and no byte."""
    with odd_http.serving(habit) as server:
        source = aiouffd.ObjectSource(server.url, timeout=20, retries=1)
        ask_by(client, source)
        with pytest.raises(aiouffd.SourceError, match=complaint) as caught:
            await read_all(source)
    decode_error(encode_error(caught.value))  # its causes are no circle: it travels from the pager


@pytest.mark.parametrize("client", ["obstore", "loop", "plain"])
@pytest.mark.parametrize("habit", ["", "ignores", "none", "modified", "modified, ignores", "weak", "weak tag"])
async def test_a_change_is_noticed(habit: str, client: str) -> None:
    """By what the server refuses, or by what it answers; in both ways of asking."""
    with odd_http.serving(habit.partition(",")[0]) as server:
        source = aiouffd.ObjectSource(server.url)
        await source.prepare()
        ask_by(client, source)
        assert bytes(await source.read(0, 100)) == odd_http.DATA[:100]
        server.habit = habit
        await asyncio.to_thread(server.change)
        for _ in range(2):
            with pytest.raises(aiouffd.SourceError, match="has changed since it was opened"):
                await source.read(100, 100)
        await source.aclose()


@pytest.mark.parametrize("client", ["obstore", "loop", "plain"])
@pytest.mark.parametrize("size", [150, SIZE_OF_ODD + 1])
async def test_another_size_is_noticed(size: int, client: str) -> None:
    """A server without any validator tells the size; behind a smaller object's end it says 416."""
    with odd_http.serving("none") as server:
        source = aiouffd.ObjectSource(server.url)
        await source.prepare()
        ask_by(client, source)
        server.data = bytes(size)
        for offset in (100, 1000):
            with pytest.raises(aiouffd.SourceError, match="has changed since it was opened"):
                await source.read(offset, 100)
        await source.aclose()


def test_a_server_without_validators_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be noticed is said once."""
    with odd_http.serving("none") as server:
        source = aiouffd.ObjectSource(server.url)
        assert source.size == source.size == SIZE_OF_ODD
        assert source.identity is None
    assert [record.message.count("changes that keep the size may not be noticed") for record in caplog.records] == [1]


def test_an_empty_object() -> None:
    """It has no first byte to ask for, and the size 0."""
    with odd_http.serving() as server:
        server.data = b""
        assert aiouffd.ObjectSource(server.url).size == 0


def test_a_size_that_nobody_tells() -> None:
    """No total in Content-Range, and HEAD is refused."""
    with odd_http.serving("star") as server:
        assert aiouffd.ObjectSource(server.url).size == SIZE_OF_ODD
    with odd_http.serving("star, head 405") as server, pytest.raises(aiouffd.SourceError, match="405"):
        _ = aiouffd.ObjectSource(server.url).size


@pytest.mark.parametrize(("retries", "failures", "tries"), [(0, 1, 1), (2, 5, 3), (2, 2, 3), (None, 5, 6)])
async def test_retries(retries: int | None, failures: int, tries: int, caplog: pytest.LogCaptureFixture) -> None:
    """As many as were asked for, else until the timeout; each is counted; the outage and its end are logged."""
    caplog.set_level("INFO")
    counted: list[int] = []
    with odd_http.serving() as server:
        source = aiouffd.ObjectSource(server.url)
        await source.prepare()
        source.begin(20.0, retries, lambda: counted.append(1))
        server.failures, server.requests = failures, []
        try:
            noted = steps.begin()
            assert bytes(await source.read(0, 10)) == odd_http.DATA[:10]
        except aiouffd.SourceError as error:
            assert tries <= failures
            assert "503 Service Unavailable" in str(error)  # noqa: PT017 - both ends are allowed
        else:
            assert tries > failures
        finally:
            await source.aclose()
        assert len(server.requests) == tries
        assert len(counted) == tries - 1
        assert [name for name, *_ in noted] == ["retry"] * (tries - 1)
    told = [record.message for record in caplog.records if "ObjectSource" in record.message]
    assert sum("trying again" in text for text in told) == (1 if tries > 1 else 0)
    assert sum("answers again" in text for text in told) == (1 if tries > 1 and tries > failures else 0)


async def test_an_outage_is_logged_as_long_as_it_lasts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At its beginning, and every ten seconds, however many reads fail."""
    monkeypatch.setattr("aiouffd.sources.object_store._REMINDER", 0.0)
    with odd_http.serving() as server:
        source = aiouffd.ObjectSource(server.url)
        await source.prepare()
        server.failures = 4
        await source.read(0, 10)
    assert [record.message.count("trying again") for record in caplog.records] == [1] * 4


async def test_hiccups_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A server that fails now and then is told once in ten seconds."""
    with odd_http.serving() as server:
        source = aiouffd.ObjectSource(server.url)
        await source.prepare()
        for _ in range(4):
            server.failures = 1
            await source.read(0, 10)
    assert [record.message.count("trying again") for record in caplog.records] == [1]


async def test_the_monitors_limits_reach_a_url() -> None:
    """Unless the source has its own."""
    source = aiouffd.ObjectSource("http://127.0.0.1:1/x")
    source.begin(3.0, 2, lambda: None)
    assert (source.timeout, source._most) == (3.0, 2)
    source.begin(None, None, lambda: None)
    assert (source.timeout, source._most) == (None, None)
    own = aiouffd.ObjectSource("http://127.0.0.1:1/x", timeout=5.0, retries=0)
    own.begin(3.0, 2, lambda: None)
    assert (own.timeout, own._most) == (5.0, 0)
    again = travelled(own)
    again.begin(3.0, 2, lambda: None)
    assert (again.timeout, again._most) == (5.0, 0)


def test_pauses_are_bounded() -> None:
    """No pause of minutes, however long the outage."""
    for timeout, most in ((None, 2.0), (30.0, 2.0), (5.0, 0.5)):
        source = aiouffd.ObjectSource("http://127.0.0.1:1/x")
        source.timeout = timeout
        failure, now = Failure("it fails", may_pass=True), time.monotonic()
        assert most / 2 <= (source._pause(50, failure, now) or 0) <= most
        assert (source._pause(0, failure, now) or 1) <= 0.1
        asked_for = attrs.evolve(failure, retry_after=1.0)  # what the server asks for, and the usual jitter
        assert 1.0 < (source._pause(0, asked_for, now) or 0) <= 1.1
        seconds = timeout or 30.0  # where it asks for more than there is time, once more at the end of the time
        late = attrs.evolve(failure, retry_after=86400.0)
        assert seconds / 2 < (source._pause(0, late, now) or 0) <= seconds * 2 / 3
        assert (source._pause(0, late, now - seconds) is None) is (timeout is not None)


@pytest.mark.parametrize("client", ["direct", "plain"])
async def test_retry_after_is_kept_to(client: str) -> None:
    """By the first request, and by reads: the server is asked again when it wants to be, and not before."""
    with odd_http.serving("" if client == "direct" else "star") as server:
        server.retry_after = "1"
        source = aiouffd.ObjectSource(server.url)
        server.failures = 1
        await source.prepare()
        source.begin(20.0, None, lambda: None)
        await source.read(5000, 10)
        server.failures, before = 1, len(server.times)
        assert bytes(await source.read(5000, 10)) == odd_http.DATA[5000:5010]
        await source.aclose()
        for first, second in (server.times[:2], server.times[before:]):
            assert second - first >= 1.0  # the server's wish, not a measurement of how quick this is


def test_a_server_that_is_not_there() -> None:
    """It is told after some tries, with what to look at."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        with pytest.raises(aiouffd.SourceError, match="the server refuses connections"):
            _ = aiouffd.ObjectSource(url, timeout=1).size


def test_a_server_that_does_not_answer() -> None:
    """A timeout is an error of its own, and is not tried again: the timeout is over."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(aiouffd.SourceTimeoutError, match=r"no answer in 0\.3 s"):
            _ = aiouffd.ObjectSource(url, timeout=0.3).size


def test_a_dead_proxy_is_told_as_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is not to blame."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://someone:hidden@127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", address)
        with pytest.raises(
            aiouffd.SourceError, match=r"the proxy http://127\.0\.0\.1:.* refuses connections"
        ) as caught:
            _ = aiouffd.ObjectSource("http://example.invalid/x", timeout=1).size
        assert "hidden" not in str(caught.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by openssl")
@pytest.mark.parametrize("habit", ["", "short"])
def test_certificates(tmp_path: Path, habit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not trusted is told as that; SSL_CERT_FILE names one to trust, in both ways of asking."""
    authority, context = odd_http.certified(tmp_path)
    with odd_http.serving(habit, context) as server:
        with pytest.raises(aiouffd.SourceError, match=r"certificate of the server is not trusted.*SSL_CERT_FILE"):
            _ = aiouffd.ObjectSource(server.url).size
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        asyncio.run(read_all(aiouffd.ObjectSource(server.url)))
        source = aiouffd.ObjectSource(server.url)
        source._client = PlainHttp(server.url, {}, 10, lambda: None)
        monkeypatch.delenv("SSL_CERT_FILE")
        source._client = PlainHttp(server.url, {}, 10, lambda: None)
        with pytest.raises(aiouffd.SourceError, match="certificate of the server is not trusted"):
            _ = source.size


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said at once, and no metadata service is asked."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    for url in ("s3://bucket/key", "gs://bucket/key", "az://container/key"):
        with pytest.raises(aiouffd.SourceError, match="there are no credentials: set"):
            _ = aiouffd.ObjectSource(url).size


async def test_a_bucket_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS_ENDPOINT_URL, AWS_ALLOW_HTTP and the keys, as other programs read them."""
    with odd_http.serving() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        with pytest.raises(aiouffd.SourceError, match="AWS_ALLOW_HTTP=true"):
            _ = aiouffd.ObjectSource("s3://bucket/a/key").size
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        await read_all(aiouffd.ObjectSource("s3://bucket/a/key"))
        assert server.requests[0][1]["authorization"].startswith("AWS4-HMAC-SHA256 Credential=key/")


def test_something_else_is_done_until_the_size_is_there() -> None:
    """Between the request and the answer; before, where obstore asks; not where nobody will answer."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                if done.wait(60):
                    head = 'HTTP/1.1 206 x\r\nContent-Range: bytes 0-0/7\r\nContent-Length: 1\r\nETag: "a"\r\n\r\n'
                    connection.sendall(head.encode() + b"x")

        thread = threading.Thread(target=answer)
        thread.start()
        source = aiouffd.ObjectSource(f"http://127.0.0.1:{server.getsockname()[1]}/x", timeout=20.0)
        source.ask_size(done.set)
        thread.join()
    assert (source.size, source.validator, done.is_set()) == (7, '"a"', True)
    calls: list[int] = []
    source.ask_size(lambda: calls.append(source.size))  # it is known
    with odd_http.serving() as odd:
        source = aiouffd.ObjectSource(odd.url, **HEADERS)
        source.ask_size(lambda: calls.append(len(odd.requests)))
    assert (calls, source.size) == ([0], len(odd_http.DATA))
    with pytest.raises(aiouffd.SourceError):
        aiouffd.ObjectSource(odd.url, retries=0).ask_size(lambda: calls.append(1))
    assert calls == [0]


async def test_the_size_is_asked_for_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `prepare`: the first use of `size` blocks."""
    asked: list[int] = []

    def first(_: aiouffd.ObjectSource) -> Validator:
        asked.append(threading.get_ident())
        return Validator(7)

    monkeypatch.setattr(aiouffd.ObjectSource, "_first", first)
    source = aiouffd.ObjectSource("http://127.0.0.1:9/x")
    await source.prepare()
    assert source.size == 7
    assert len(asked) == 1
    assert asked != [threading.get_ident()]


async def test_a_source_that_is_served_again() -> None:
    """Its connections are kept as before, also if another loop uses it meanwhile."""
    with odd_http.serving() as server:
        source = aiouffd.ObjectSource(server.url, timeout=20)
        await source.prepare()
        for _ in range(2):
            source.begin(20, 1, lambda: None)
            await source.read(0, 10)
            assert isinstance(source._direct, LoopHttp)
            assert len(source._direct._idle) == 1
            assert bytes(await asyncio.to_thread(asyncio.run, source.read(5, 10))) == odd_http.DATA[5:15]
            await source.aclose()
            await source.read(0, 10)
            assert source._direct is None


@pytest.mark.parametrize("moved", [True, False])
async def test_what_is_moved_may_be_received_by_another_loop(moved: bool) -> None:
    """And only that: until it is served again, in another way."""
    with odd_http.serving() as server:
        source = aiouffd.ObjectSource(server.url)
        await source.prepare()
        for again in (False, True):
            source.begin(20, 1, lambda: None)
            if moved and not again:
                source.moved()
            await source.read(0, 10)
            assert type(source._direct) is (HelpedHttp if moved and not again else LoopHttp)
            await source.aclose()


@pytest.mark.parametrize(
    ("url", "direct"),
    [
        ("http://a.example/b", True),
        ("http://[::1]:80/a/b%20c.bin?x=1&y=%2F..", True),
        ("https://a.example/b", False),
        ("http://me@a.example/b", False),
        *((f"http://{url}", False) for url in ("ä.example/b", "A.example/b", "a.example/b c", "a.example/ä")),
        *(
            (f"http://a.example/{path}", False)
            for path in ("a/../b", "./b", "%2E/b", "a\\b", "a|b", "b?q='", "b?", "b#")
        ),
    ],
)
def test_what_is_sent_as_it_is(url: str, direct: bool) -> None:
    """A URL that obstore would send as another one goes through obstore."""
    assert aiouffd.ObjectSource(url)._may_go_direct() == direct


@pytest.mark.parametrize(
    ("url", "options", "direct"),
    [
        ("{}", {}, True),
        ("{}", HEADERS, False),
        ("//me:secret@", {}, False),
    ],
)
async def test_what_is_read_on_the_loop(url: str, options: dict[str, Any], direct: bool) -> None:
    """Plain http, by whoever closes the source; what needs more goes through obstore."""
    with odd_http.serving() as server:
        source = aiouffd.ObjectSource(
            url.format(server.url) if "{" in url else server.url.replace("//", url), **options
        )
        await source.prepare()
        await source.read(0, 10)
        assert source._direct is None
        source.begin(20, 1, lambda: None)
        assert bytes(await source.read(5, 10)) == odd_http.DATA[5:15]
        assert (source._direct is not None) == direct
        assert (server.requests[0][1]["user-agent"] == "aiouffd") == direct
        if options:
            assert server.requests[-1][1]["x-token"] == "token"
        await source.aclose()


async def test_a_server_that_does_not_answer_is_asked_once() -> None:
    """And not by obstore once more."""
    with await asyncio.to_thread(socket.create_server, ("127.0.0.1", 0)) as listening:
        source = aiouffd.ObjectSource(f"http://127.0.0.1:{listening.getsockname()[1]}/x", timeout=0.2)
        with pytest.raises(aiouffd.SourceTimeoutError):
            await source.prepare()
        listening.accept()[0].close()
        listening.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            listening.accept()


def forks(url: str, engine: str) -> None:
    """Scenario: a process that has opened a URL forks; the child opens it, too, then the parent once more."""
    options: dict[str, Any] = {"in_thread": {"engine": aiouffd.InThread()}, "pager": {}}[engine]
    source = aiouffd.ObjectSource(url, **HEADERS)
    assert source.size == SIZE
    with aiouffd.open(url, **options) as region:
        assert region[:9] == DATA[:9]
    for _ in range(3):
        child = os.fork()
        if not child:
            assert bytes(asyncio.run(source.read(9, 9))) == DATA[9:18]
            with aiouffd.open(url, **options) as region:
                assert region[70_000:70_009] == DATA[70_000:70_009]
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with aiouffd.open(url, **options) as region:
            assert region[140_000:140_009] == DATA[140_000:140_009]
        assert aiouffd.ObjectSource(url, **HEADERS).size == SIZE


@pytest.mark.parametrize("engine", ["in_thread", "pager"])
def test_a_forked_child_opens_urls(url: str, engine: str) -> None:
    """Without obstore, whose runtime is its parent's."""
    play(forks, f"{url}/data.bin", engine)


def forks_from_a_bucket(url: str) -> None:
    """Scenario: the child opens an object that only obstore can ask for."""
    assert aiouffd.ObjectSource(url, **HEADERS).size == SIZE
    child = os.fork()
    if not child:
        source = aiouffd.ObjectSource("s3://bucket/key", access_key_id="a", secret_access_key="b", region="c")
        with pytest.raises(aiouffd.SourceError, match=r"obstore does not survive a fork.*spawn"):
            _ = source.size
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_forked_child_cannot_open_buckets(url: str) -> None:
    """The error says what to do."""
    play(forks_from_a_bucket, f"{url}/data.bin")


def test_what_a_cache_may_rely_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket's URL does not name the endpoint: the same key of another store is another object."""
    for name in [name for name in os.environ if "endpoint" in name.lower()]:
        monkeypatch.delenv(name)
    source = aiouffd.ObjectSource("s3://bucket/key", region="x")
    assert [source.cache_identity] == [None]
    monkeypatch.setattr(aiouffd.ObjectSource, "identity", ("s3://bucket/key", 5, '"tag"'))
    plain = source.cache_identity
    assert plain == ("s3://bucket/key", 5, '"tag"')
    found = {plain, aiouffd.ObjectSource("s3://bucket/key", endpoint="https://one").cache_identity}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://two")
    found.add(source.cache_identity)
    assert len(found) == 3
