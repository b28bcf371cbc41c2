"""Ranges of an object through obstore.

obstore's runtime does not survive os.fork: a child has none of its threads, and shares its epoll set with the parent. A
request there would never end, and disturb those of the parent.
"""

from __future__ import annotations

import copy
import ctypes
import datetime as dt
import os
import weakref
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aiouffd.sources.http_answer import Answer, Validator
from aiouffd.sources.store_errors import COMPRESSED, Failure, Proxy, RequestError, from_obstore
from aiouffd.sources.store_settings import client_options, obstore, require_credentials, split_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["StoreClient", "is_lost"]

_clients: weakref.WeakSet[StoreClient] = weakref.WeakSet()
_state = {"used": False, "lost": False}
_LARGEST_PUT = 1 << 30  # bytes of one request; S3 takes 5 GiB, and conditions only without parts
_NO_DATE = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)  # what obstore has in place of a missing Last-Modified


class StoreClient:
    """One object in a store. It holds connections and threads of obstore, and cannot be pickled.

    Args:
        url: of the object.
        options: for `obstore.store.from_url`.
        timeout: seconds for one request.
        proxy: see `store_errors.Proxy`.
        key: of the object, if the URL is that of what it is in.

    Raises:
        ValueError: the URL or an option cannot be used, or there are no credentials.
        SourceError: obstore is not installed.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any], timeout: float, proxy: Proxy, key: str | None = None
    ) -> None:
        settings = dict(options)
        root, self._key = split_url(url) if key is None else (url, key)
        if urlsplit(url).scheme != "file":
            require_credentials(url, options)
            seconds = dt.timedelta(seconds=timeout)
            settings["client_options"] = {"timeout": seconds, **client_options(url, options.get("client_options", {}))}
            # Retries of obstore can neither be counted nor logged: the source has its own.
            settings.setdefault("retry_config", {"max_retries": 0, "retry_timeout": seconds})
        self._obstore = obstore()
        _state["used"] = True
        self._proxy = proxy
        try:
            self._store = self._obstore.store.from_url(root, **settings)
        except Exception as error:
            raise ValueError(str(error).strip().partition("\n")[0]) from error
        _clients.add(self)

    def sibling(self, key: str) -> StoreClient:
        """Return a client of another object in the same place, by the same connections."""
        other = copy.copy(self)
        other._key = key  # noqa: SLF001 - its own
        _clients.add(other)
        return other

    def get(self, start: int, stop: int, pinned: Validator | None) -> Answer:
        """Return the bytes [start, stop); blocks. As `PlainHttp.get`."""
        try:
            result = self._obstore.get(self._store, self._key, options=_conditions(start, stop, pinned))
            data = result.bytes()
        except Exception as error:
            raise self._failed(error) from error
        return _answer(result, data)

    async def get_async(self, start: int, stop: int, pinned: Validator | None) -> Answer:
        """As `get`, without blocking. Canceling is safe."""
        try:
            result = await self._obstore.get_async(self._store, self._key, options=_conditions(start, stop, pinned))
            data = await result.bytes_async()
        except Exception as error:
            raise self._failed(error) from error
        return _answer(result, data)

    def size(self) -> int | None:
        """Return the size of the object by a HEAD request; blocks. Raises as `get`."""
        return self.head()[0]

    def head(self) -> tuple[int, float]:
        """Return (size, time of change) of the object by a HEAD request; blocks. Raises as `get`."""
        try:
            found = self._obstore.head(self._store, self._key)
        except Exception as error:
            raise self._failed(error) from error
        return found["size"], found["last_modified"].timestamp()

    def put(self, data: bytes, *, replace: bool, tag: str | None = None) -> bool:
        """Write the object, whole or not at all, and tell whether it was written; blocks. Raises as `get`.

        Args:
            data: of the object.
            replace: False: one that is there stays.
            tag: one that has another ETag stays.
        """
        mode: Any = ("overwrite" if replace else "create") if tag is None else {"e_tag": tag}
        exceptions = self._obstore.exceptions
        try:
            self._obstore.put(self._store, self._key, data, mode=mode, use_multipart=len(data) > _LARGEST_PUT)
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            return False
        except Exception as error:
            raise self._failed(error) from error
        return True

    def list(self) -> Iterator[tuple[str, int, float]]:
        """Yield (key, size, time of change) of the objects below this one; blocks. Raises as `get`."""
        try:
            for some in self._obstore.list(self._store, self._key or None):
                for item in some:
                    yield item["path"], item["size"], item["last_modified"].timestamp()
        except Exception as error:
            raise self._failed(error) from error

    def delete(self) -> None:
        """Remove the object; nothing if it is not there; blocks. Raises as `get`."""
        try:
            self._obstore.delete(self._store, self._key)
        except FileNotFoundError:
            pass
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Do nothing: obstore closes its connections by itself."""

    def _failed(self, error: Exception) -> RequestError:
        return RequestError(from_obstore(error, self._proxy))


def _conditions(start: int, stop: int, pinned: Validator | None) -> dict[str, Any]:
    """Return the options of a request: its range, and the version that it must be of."""
    options: dict[str, Any] = {"range": (start, stop)}
    if pinned is not None and pinned.strong_tag is not None:
        options["if_match"] = pinned.strong_tag
    elif pinned is not None and pinned.modified is not None:
        options["if_unmodified_since"] = pinned.modified
    return options


def _answer(result: Any, data: Any) -> Answer:
    if result.attributes.get("Content-Encoding", "identity") != "identity":
        raise RequestError(Failure(COMPRESSED))
    meta = result.meta
    modified = None if meta["last_modified"] == _NO_DATE else meta["last_modified"]
    return Answer(data, result.range[0], Validator(meta["size"], meta["e_tag"], modified))


def is_lost() -> bool:
    """Tell whether obstore cannot be used: this process was forked from one that has used it."""
    return _state["lost"]


def _in_child() -> None:
    _state["lost"] = _state["used"]
    for client in _clients:  # never to be freed: they would take the parent's connections out of its epoll set
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client._store))  # noqa: SLF001 - its own


os.register_at_fork(after_in_child=_in_child)
