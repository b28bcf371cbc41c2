"""Objects behind http(s), s3, gs, az and file URLs, through obstore (the extra `aiouffd[http]`)."""

from __future__ import annotations

import asyncio
import http.client
import logging
import mmap
import os
import random
import re
import time
from typing import TYPE_CHECKING, Any, TypeVar, Unpack
from urllib.parse import urlsplit, urlunsplit

from aiouffd.errors import ShortReadError, SourceError, SourceTimeoutError
from aiouffd.sources import repeated
from aiouffd.sources.helped_http import HelpedHttp
from aiouffd.sources.http_answer import Answer, Validator
from aiouffd.sources.loop_http import LoopHttp, head_of
from aiouffd.sources.plain_http import PlainHttp, first_bytes
from aiouffd.sources.steps import noted
from aiouffd.sources.storage_options import check_options
from aiouffd.sources.store_client import StoreClient, is_lost
from aiouffd.sources.store_errors import CHANGED, Failure, RequestError
from aiouffd.sources.store_settings import proxy_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.sources.storage_options import StorageOptions

__all__ = ["ObjectSource"]

log: logging.Logger = logging.getLogger("aiouffd")

_Result = TypeVar("_Result")

_DEFAULT_TIMEOUT = 30.0
_FIRST_RETRIES = 3
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0
_FORKED = (
    "obstore does not survive a fork, and the parent of this process has used it: start the process by spawn or"
    " forkserver of multiprocessing"
)
_WITNESS = mmap.PAGESIZE  # bytes of the first answer; and of a read, to be read again where nothing names the version
_SENT_AS_IT_IS = re.compile(
    r"http://[a-z\d.:[\]-]+(?:/(?!\.|%2[eE])[\w%:=&~+!$,;@()*.-]*)+(?:\?[\w%:=&~+!$,;@()*./?-]+)?", re.ASCII
)  # no user, nothing that is quoted or left out
_REMINDER = 10.0  # seconds between two messages about outages


class ObjectSource:
    """One object in a store, read by ranges.

    The object is pinned: a read after it has changed is an error, not a mixture of both versions. A request has
    If-Match with the ETag, or If-Unmodified-Since, and the ETag, Last-Modified and size of each answer are compared. If
    the server tells neither ETag nor Last-Modified, that is logged, and each read is followed by another one of bytes
    that were read before: so most changes are noticed, but not all.

    A request that fails in a way that may pass (a lost or refused connection, a timeout, 429, 5xx) is repeated with
    exponential backoff and jitter. A Retry-After that says more is kept to, over http without TLS (obstore does not
    tell it). An outage is logged as long as it lasts.

    Args:
        url: `https://...`, `http://...`, `s3://bucket/key`, `gs://...`, `az://...` or `file:///...`.
        timeout: seconds for one read, retries included. No retry begins after two thirds of them. By default that of
            the Monitor, 30 s.
        retries: limit of the retries of one read. By default that of the Monitor; if that has none, the timeout is
            the only limit, so that a server may be restarted. The first request, which finds the size, is repeated at
            most three times, so that a wrong address is an error soon.
        **options: passed to the store (credentials, endpoint, region): see `obstore.store.from_url`. What is not
            given comes from the environment, as obstore reads it (AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, http_proxy, ...).

    Attributes:
        url: as given.
        timeout: seconds for one read, None: no limit.

    Raises:
        SourceError: the URL cannot be used.
    """

    retries = 0
    """The engine does not repeat a failed read: this source has."""
    gives = True
    """Nobody else reads what `read` returns."""
    local = False
    """`read_nowait` has only what the first request has brought."""

    def __init__(
        self, url: str, *, timeout: float | None = None, retries: int | None = None, **options: Unpack[StorageOptions]
    ) -> None:
        check_options(url, options)
        self.url = url
        self.timeout: float | None = _DEFAULT_TIMEOUT if timeout is None else timeout
        self._given = timeout, retries
        self._most = retries
        self._on_retry: Callable[[], None] = _nothing
        self._options = options
        self._pinned: Validator | None = None
        self._witness: tuple[int, bytes] = (0, b"")  # (offset, bytes that were read there)
        # Made at first use: they do not travel.
        self._client: StoreClient | PlainHttp | None = None
        self._direct: LoopHttp | HelpedHttp | None = None
        self._shared: Callable[[], LoopHttp] | None = None
        self._head: str | None = None
        self._is_moved = False
        self._goes_direct = False  # from `begin` to `aclose`, or until an answer was refused
        self._failing_since: float | None = None
        self._logged = -_REMINDER

    def share(self, client: StoreClient | None, direct: Callable[[], LoopHttp]) -> None:
        """Ask by connections that are there already, for an object that never changes: no version of it is pinned.

        Args:
            client: of this object; None: its own.
            direct: returns what asks its server, if that may be asked on the loop. It stays its owner's.
        """
        self._client, self._shared = client, direct

    @property
    def size(self) -> int:
        """Bytes of the object. The first use asks the server, and blocks: `prepare()` does not.

        Raises:
            SourceError: it is not there, not reachable, not allowed, or served without ranges.
        """
        if self._pinned is None:
            self._pinned = self._first()
        assert self._pinned.size is not None
        return self._pinned.size

    def ask_size(self, meanwhile: Callable[[], None]) -> None:
        """As `size`, and call a function where it has to be asked for: behind the request, or else before it.

        Args:
            meanwhile: begins something, and returns; it is not called where no server answers that is asked directly.
        """
        if self._pinned is not None:
            return
        if not self._may_go_direct():
            meanwhile()
        self._pinned = self._first(meanwhile)

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """What only the same bytes have; None: the server does not say, or was not asked yet."""
        pinned = self._pinned
        return None if pinned is None or pinned.strong_tag is None else (self.url, pinned.size, pinned.strong_tag)

    @property
    def cache_identity(self) -> tuple[Any, ...] | None:
        """As `identity`, with the endpoint that a bucket's URL does not name: what a cache may rely on."""
        identity = self.identity
        settings = {**os.environ, **self._options}
        endpoints = sorted((name, str(value)) for name, value in settings.items() if "endpoint" in name.lower())
        return None if identity is None else (*identity, *endpoints)

    @property
    def validator(self) -> str | None:
        """What the server calls this version of the object; None: it does not say, or was not asked yet."""
        return None if self._pinned is None else self._pinned.strong_tag

    async def prepare(self) -> None:
        """Ask the server for the size, in a thread. Canceling is safe. Raises as `size` does."""
        await asyncio.to_thread(getattr, self, "size")

    def begin(self, timeout: float | None, retries: int | None, on_retry: Callable[[], None]) -> None:
        """Take over what the Monitor was given, as far as this source was not given its own."""
        own_timeout, own_retries = self._given
        before = self._seconds
        self.timeout = timeout if own_timeout is None else own_timeout
        if self._seconds != before:
            self._client = self._direct = None  # they have the other timeout
        self._most = retries if own_retries is None else own_retries
        self._on_retry = on_retry
        self._goes_direct, self._is_moved = True, False

    def moved(self) -> None:
        """Receive by two threads: whoever copies it would have to fetch it from the other processor's caches."""
        self._is_moved = True

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """Return bytes that came with the size, if they are of a version that is known: files begin with a header."""
        begin, data = self._witness
        if begin or offset + length > len(data) or self._pinned is None or not self._pinned.names_version:
            return None
        return data[offset : offset + length]

    async def read(self, offset: int, length: int) -> Any:
        """Return the bytes, in the buffer that the store has received them in. Canceling is safe.

        Raises:
            SourceError: for good.
            SourceTimeoutError: no answer in time.
        """
        pieces: list[Any] = []
        at, stop = offset, offset + length
        while at < stop:
            answer = await self._persist(at, stop)
            if not len(answer.data):
                raise ShortReadError(repr(self), at, stop - at, "the server gave no bytes, and no error")
            pieces.append(answer.data)
            at += len(answer.data)
        if at > stop:
            raise ShortReadError(repr(self), offset, length, f"gave {at - offset} bytes of {length}")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def aclose(self) -> None:
        """Let threads end."""
        if self._client is not None:
            self._client.close()
        self._end_direct()

    # Requests

    async def _persist(self, start: int, stop: int) -> Answer:
        """Request bytes of the pinned version until they come, or it is too late."""
        began = time.monotonic()
        tries = 0
        while True:
            try:
                answer = await self._get(start, stop)
                if (pinned := self._pinned) is not None and not (answer.validator == pinned and pinned.names_version):
                    await self._compare(answer, pinned)
            except RequestError as error:
                failure = error.failure
                pause = self._pause(tries, failure, began)
                if not failure.may_pass or pause is None or (self._most is not None and tries >= self._most):
                    raise self._error(failure, start, stop - start) from error
                self._retry(failure)
                tries += 1
                waits = time.perf_counter_ns()
                await asyncio.sleep(pause)
                noted("retry", waits)
            else:
                self._succeeded()
                return answer

    async def _compare(self, answer: Answer, pinned: Validator) -> None:
        """Compare the version of an answer with the pinned one; where nothing names that, bytes."""
        if pinned.contradicts(answer.validator):
            raise RequestError(Failure(CHANGED))
        if not pinned.names_version:
            await self._read_again()
            self._witness = answer.start, bytes(memoryview(answer.data)[:_WITNESS])

    async def _get(self, start: int, stop: int) -> Answer:
        if self._direct is None and self._goes_direct and (self._pinned is not None or self._shared is not None):
            self._goes_direct = self._may_go_direct()
            if self._goes_direct and self._shared is not None:
                self._direct, self._head = self._shared(), head_of(self.url, Validator(None))
            elif self._goes_direct and self._pinned is not None:
                self._direct = (HelpedHttp if self._is_moved else LoopHttp)(self.url, self._seconds, self._pinned)
        if self._direct is not None and self._direct.is_here:
            try:
                return await self._direct.get_async(start, stop, self._head)
            except RequestError as error:
                if not error.failure.answer_refused:
                    raise
            self._end_direct()
        try:
            return await self._connect().get_async(start, stop, self._pinned)
        except RequestError as error:
            return await self._other_client(error).get_async(start, stop, self._pinned)

    def _may_go_direct(self) -> bool:
        """Tell whether requests need nothing that obstore is there for: TLS, signatures, options, a proxy."""
        plain = _SENT_AS_IT_IS.fullmatch(self.url) is not None and not self._options
        return plain and self._proxy() is None and not isinstance(self._client, PlainHttp)

    def _end_direct(self) -> None:
        """Ask through obstore from now on."""
        self._goes_direct = False
        if self._direct is not None and self._direct.is_here:
            if self._shared is None:
                self._direct.close()
            self._direct = None

    async def _read_again(self) -> None:
        """Compare bytes that were read before with what they are now."""
        start, data = self._witness
        again = await self._get(start, start + len(data))
        if bytes(again.data) != data[: len(again.data)]:
            raise RequestError(Failure(CHANGED))

    def ask(self, call: Callable[[Any], _Result]) -> _Result:
        """Return what `call` returns for the client of this object; repeat it if that may help. Blocks.

        Raises:
            SourceError: it raised a RequestError, and went on doing so. SourceTimeoutError: no answer in time.
        """
        return self._repeat(lambda: self._by_client(call))

    def _by_client(self, call: Callable[[Any], _Result]) -> _Result:
        try:
            return call(self._connect())
        except RequestError as error:
            return call(self._other_client(error))

    def _repeat(self, ask: Callable[[], _Result]) -> _Result:
        most = _FIRST_RETRIES if self._given[1] is None else self._given[1]
        began = time.monotonic()
        tries = 0
        while True:
            try:
                return ask()
            except RequestError as error:
                pause = self._pause(tries, error.failure, began)
                if not error.failure.may_pass or error.failure.timed_out or pause is None or tries >= most:
                    raise self._error(error.failure, 0, 0) from error
                time.sleep(pause)
                tries += 1

    def _first(self, meanwhile: Callable[[], None] = lambda: None) -> Validator:
        """Ask for the first page: the answer has the size and the validators. Blocks."""
        begins = [meanwhile]  # once, however often is asked
        found = self._repeat(
            lambda: self._look_directly(lambda: begins.pop()() if begins else None) or self._by_client(self._look)
        )
        if (found.size or 0) >> 63:
            raise SourceError(repr(self), 0, 0, f"the server says that it has {found.size} bytes, more than any file")
        if found.size and not found.names_version:
            repeated.warn(self, "has no ETag and no Last-Modified: changes that keep the size may not be noticed")
        return found

    def _look_directly(self, meanwhile: Callable[[], None]) -> Validator | None:
        """Ask without obstore, where that can do; None: obstore knows better what to make of the answer."""
        if not self._may_go_direct():
            return None
        try:
            answer = first_bytes(self.url, _WITNESS, self._seconds, meanwhile)
        except RequestError as error:
            if error.failure.timed_out or error.failure.retry_after:
                raise
            return None
        except (OSError, http.client.HTTPException, ValueError):
            return None
        self._witness = 0, bytes(answer.data)
        return answer.validator if answer.validator.size is not None else None

    def _look(self, client: StoreClient | PlainHttp) -> Validator:
        # Not by HEAD: a URL may be signed for GET only, and servers forget HEAD. A server without Range says so now.
        try:
            answer = client.get(0, _WITNESS, None)
        except RequestError as error:
            if error.failure.status != 416:
                raise
            answer = Answer(b"", 0, Validator(None))  # Range Not Satisfiable: an empty object has no first byte
        self._witness = 0, bytes(answer.data)
        found = answer.validator
        if found.size is None:
            found = Validator(client.size(), found.tag, found.modified)
        if found.size is None:
            raise RequestError(Failure("the server does not tell the size of the object"))
        return found

    def _connect(self) -> StoreClient | PlainHttp:
        if is_lost() and not isinstance(self._client, PlainHttp):
            return self._without_obstore(RequestError(Failure(_FORKED)))
        if self._client is None:
            try:
                self._client = StoreClient(self.url, self._options, self._seconds, self._proxy)
            except ValueError as error:
                raise SourceError(repr(self), 0, 0, f"this URL cannot be used: {error}") from error
        return self._client

    def _other_client(self, error: RequestError) -> PlainHttp:
        """Return the client to use from now on, if obstore refused an answer that may be valid; else raise."""
        if not error.failure.answer_refused:
            raise error
        return self._without_obstore(error)

    def _without_obstore(self, error: RequestError) -> PlainHttp:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise error
        if not isinstance(self._client, PlainHttp):  # several reads may fail at once
            self._client = PlainHttp(self.url, self._options.get("client_options", {}), self._seconds, self._proxy)
        return self._client

    @property
    def _seconds(self) -> float:
        return _DEFAULT_TIMEOUT if self.timeout is None else self.timeout

    # Failures

    def _pause(self, tries: int, failure: Failure, began: float) -> float | None:
        """Return the seconds until the next try of a read that began then; None: that is too late."""
        longest = _LONGEST_PAUSE if self.timeout is None else min(_LONGEST_PAUSE, self.timeout / 10)
        pause = min(longest, _FIRST_PAUSE * 2**tries)
        # Jitter: clients that failed together do not come back together.
        pause = random.uniform(pause / 2, pause)  # noqa: S311 - spreads load, keeps no secret
        left = self._seconds * 2 / 3 - (0 if self.timeout is None else time.monotonic() - began)
        if pause > left:
            return None
        # A server that wants to be left alone for longer than there is time is asked once more at the end of it.
        return min(failure.retry_after + pause, left) if failure.retry_after else pause

    def _retry(self, failure: Failure) -> None:
        """Count a retry, and log the outage: when it begins, and then at most every 10 s."""
        self._on_retry()
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._logged >= _REMINDER:
            self._logged = now
            log.warning("%r: %s; trying again (%.0f s so far)", self, failure.reason, now - self._failing_since)

    def _succeeded(self) -> None:
        if self._failing_since is not None:
            if self._logged >= self._failing_since:
                log.info("%r: answers again after %.1f s", self, time.monotonic() - self._failing_since)
            self._failing_since = None

    def _proxy(self) -> str | None:
        return proxy_of(self.url, self._options.get("client_options", {}))

    def _error(self, failure: Failure, offset: int, length: int) -> SourceError:
        if failure.timed_out:
            return SourceTimeoutError(repr(self), offset, length, f"{failure.reason} in {self.timeout} s")
        return SourceError(repr(self), offset, length, failure.reason)

    def __reduce__(self) -> tuple[Any, ...]:
        pinned = None if self._pinned is None else self._pinned.plain()
        return _rebuild, (self.url, *self._given, self._options, pinned, self._witness)

    def __repr__(self) -> str:
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]  # no password in a log
        return f"ObjectSource({urlunsplit((parts.scheme, host, parts.path, '', ''))!r})"


def _rebuild(
    url: str,
    timeout: float | None,
    retries: int | None,
    options: dict[str, Any],
    pinned: tuple[int | None, str | None, float | None] | None,
    witness: tuple[int, bytes],
) -> ObjectSource:
    """Rebuild a source that knows its size already: the pager need not ask again."""
    source = ObjectSource(url, timeout=timeout, retries=retries, **options)
    # Its own:
    source._pinned, source._witness = None if pinned is None else Validator.of_plain(*pinned), witness  # noqa: SLF001
    return source


def _nothing() -> None:
    """Count nothing."""
