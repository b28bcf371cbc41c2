"""Objects behind http(s), s3, gs, az and file URLs, through obstore (the extra `aiouffd[http]`)."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit, urlunsplit

from aiouffd.errors import ShortReadError, SourceError, SourceTimeoutError

__all__ = ["ObjectSource"]

_FIRST_TRIES = 3
_NO_LIMIT = 10_000  # of tries: time is the limit


def _obstore() -> Any:
    try:
        import obstore  # noqa: PLC0415 - an extra
        import obstore.store  # noqa: PLC0415
    except ImportError as error:
        raise SourceError(
            "ObjectSource", 0, 0, "needs the library obstore: install it with `pip install 'aiouffd[http]'`"
        ) from error
    return obstore


class ObjectSource:
    """One object in a store, read by ranges.

    The object is pinned: what is read after it has changed is an error, not a mixture of both (by ETag, where the
    server has one).

    Args:
        url: `https://...`, `http://...`, `s3://bucket/key`, `gs://...`, `az://...` or `file:///...`.
        timeout: seconds for one read, its retries included. A request that fails in a way that may pass (a lost or
            refused connection, 429, 5xx) is tried again with exponential backoff and jitter for two thirds of that,
            so that a server may be restarted. The first question, for the size, is tried three times: a wrong address
            is told at once.
        **options: passed to the store (credentials, endpoint, region): see `obstore.store.from_url`.

    Raises:
        SourceError: the URL cannot be used.
    """

    def __init__(self, url: str, *, timeout: float = 30.0, **options: Any) -> None:
        self.url = url
        self.timeout = timeout
        self.retries = 0  # the store's own retries are enough
        self._options = options
        self._size: int | None = None
        self._tag: str | None = None
        self._store: Any = None
        self._key = ""

    @property
    def size(self) -> int:
        """Bytes of the object. The first use asks the server, and blocks: `prepare()` does not.

        Raises:
            SourceError: it is not there, not reachable, not allowed, or served without ranges.
        """
        if self._size is None:
            obstore = _obstore()
            store = self._connect(_FIRST_TRIES)
            try:
                meta = obstore.head(store, self._key)
                self._pin(meta)
                if meta["size"]:
                    obstore.get_range(store, self._key, start=0, length=1)  # a server without Range says so now
            except Exception as error:
                raise self._explain(error, 0, 0) from error
        assert self._size is not None
        return self._size

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """What only the same bytes have; None: the server does not say, or was not asked yet."""
        return None if self._tag is None else (self.url, self._size, self._tag)

    async def prepare(self) -> None:
        """Ask the server for the size, without blocking the loop. Canceling is safe. Raises as `size` does."""
        if self._size is None:
            obstore = _obstore()
            store = self._connect(_FIRST_TRIES)
            try:
                meta = await obstore.head_async(store, self._key)
                self._pin(meta)
                if meta["size"]:
                    await obstore.get_range_async(store, self._key, start=0, length=1)
            except Exception as error:
                raise self._explain(error, 0, 0) from error

    async def read(self, offset: int, length: int) -> Any:
        """Return the bytes, in the buffer that the store has received them in. Canceling is safe.

        Raises:
            SourceError: for good; what may pass was tried again.
        """
        obstore = _obstore()
        if self._store is None:
            self._store = self._connect(_NO_LIMIT)
        try:
            if self._tag is None:
                data = await obstore.get_range_async(self._store, self._key, start=offset, length=length)
            else:
                options = {"range": (offset, offset + length), "if_match": self._tag}
                answer = await obstore.get_async(self._store, self._key, options=options)
                data = await answer.bytes_async()
        except Exception as error:
            raise self._explain(error, offset, length) from error
        if len(data) != length:
            raise ShortReadError(repr(self), offset, length, f"gave {len(data)} bytes of {length}")
        return data

    def _pin(self, meta: Any) -> None:
        self._size = meta["size"]
        tag = meta.get("e_tag")
        # A weak tag promises the same meaning, not the same bytes, and If-Match never matches it.
        self._tag = tag if tag and not tag.startswith("W/") else None

    def _connect(self, tries: int) -> Any:
        """Make a store. Done on first use: it holds connections and threads, which do not travel."""
        parts = urlsplit(self.url)
        base, _, self._key = parts.path.rpartition("/")
        if not self._key:
            raise SourceError(repr(self), 0, 0, "the URL names no object: it ends with a slash")
        root = urlunsplit((parts.scheme, parts.netloc, base, "", ""))
        self._key = unquote(self._key)  # a store encodes the key again
        if parts.scheme in ("http", "https"):
            # The store of one object, so that the URL arrives as it was given: signed ones have their query.
            root, self._key = urldefrag(self.url).url, ""
        settings: dict[str, Any] = dict(self._options)
        if parts.scheme != "file":
            seconds = dt.timedelta(seconds=self.timeout)
            client = {"allow_http": parts.scheme == "http", "timeout": seconds}
            settings["client_options"] = {**client, **settings.get("client_options", {})}
            backoff = {
                "init_backoff": dt.timedelta(milliseconds=100),
                "max_backoff": dt.timedelta(seconds=min(2.0, self.timeout / 10)),
                "base": 2,
            }
            settings.setdefault(
                "retry_config", {"max_retries": tries, "retry_timeout": seconds * 2 / 3, "backoff": backoff}
            )
        try:
            return _obstore().store.from_url(root, **settings)
        except Exception as error:
            raise SourceError(repr(self), 0, 0, f"this URL cannot be used: {_first_line(error)}") from error

    def _explain(self, error: Exception, offset: int, length: int) -> SourceError:
        """Say in one sentence what a store's exception means, and what to do."""
        if isinstance(error, SourceError):
            return error
        name = type(error).__name__
        # Behind the first line: the causes, as the store prints them. Secrets: a signed URL's query, and a password.
        text, whole = re.sub(r"\?[^\s\"')>]+", "?...", _first_line(error)), str(error)
        text = re.sub(r"//[^/@\s]+@", "//", text)
        if isinstance(error, FileNotFoundError):
            reason = "there is no such object (404): check the URL"
        elif name in ("PermissionDeniedError", "UnauthenticatedError"):
            reason = f"access was refused: check the credentials ({text})"
        elif name == "NotSupportedError" or "Range" in text:
            reason = (
                "this server answers without Range requests, and cannot be read page by page: use one that has them"
            )
        elif name == "PreconditionError":
            reason = "the object has changed since it was opened: open it again"
        elif "operation timed out" in whole or "kind: Timeout" in whole:
            return SourceTimeoutError(repr(self), offset, length, f"no answer in {self.timeout} s")
        elif "ConnectionRefused" in whole:
            reason = "the server refuses connections: is it up, and is the port right?"
        elif "dns error" in whole:
            reason = "the host's name cannot be resolved: is it spelled right?"
        elif "kind: Connect" in whole:
            reason = f"the server cannot be reached ({text})"
        else:
            reason = f"{name}: {text}"
        return SourceError(repr(self), offset, length, reason)

    def __reduce__(self) -> tuple[Any, ...]:
        state = (self.url, self.timeout, self._options, self._size, self._tag)
        return _rebuild, state

    def __repr__(self) -> str:
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]  # no password in a log
        return f"ObjectSource({urlunsplit((parts.scheme, host, parts.path, '', ''))!r})"


def _rebuild(url: str, timeout: float, options: dict[str, Any], size: int | None, tag: str | None) -> ObjectSource:
    """Rebuild a source that knows its size already: the pager need not ask again."""
    source = ObjectSource(url, timeout=timeout, **options)
    source._size, source._tag = size, tag  # noqa: SLF001 - its own
    return source


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
