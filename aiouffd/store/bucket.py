"""A store behind a URL: http(s), which is read only, and s3, gs, az through obstore. All but `part` blocks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aiouffd.errors import SourceError, StoreError
from aiouffd.sources.http_answer import Answer, Validator
from aiouffd.sources.loop_http import LoopHttp
from aiouffd.sources.object_store import ObjectSource
from aiouffd.sources.store_client import StoreClient, is_lost
from aiouffd.sources.store_errors import RequestError, hide_secrets
from aiouffd.sources.store_settings import proxy_of
from aiouffd.store.folder import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["Bucket"]

_TIMEOUT = 30.0
_WRITE_TIMEOUT = 600.0  # seconds for a pack of 64 MiB
_PIECE = 8 << 20  # bytes of one request that reads
_MISSING = (404, 410)
_BEHIND_THE_END = 416


class Bucket:
    """Objects below a URL.

    Args:
        url: of what they are in, without a slash at its end.
        options: for the store, as for `ObjectSource`.
        timeout: seconds for one request, where `part` is given no other; None: 30.
    """

    is_local = False

    def __init__(self, url: str, options: Mapping[str, Any], timeout: float | None = None) -> None:
        self.url: str = url.rstrip("/")
        self._options = dict(options)
        self._timeout = timeout or _TIMEOUT
        self._http = urlsplit(url).scheme in ("http", "https")
        self._clients: dict[float, StoreClient] = {}  # by their timeouts
        self._direct: dict[float, LoopHttp] = {}  # likewise

    def is_same(self, other: object) -> bool:
        """Tell whether another store is this one."""
        return isinstance(other, Bucket) and other.url == self.url

    def name(self, path: str) -> str:
        """Return what an object is called in errors."""
        return hide_secrets(f"{self.url}/{path}")

    def part(
        self,
        path: str,
        timeout: float | None = None,
        retries: int | None = None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> ObjectSource:
        """Return an object as a source: see there for the arguments. All have the connections of this store.

        Raises:
            StoreError: the URL cannot be used.
        """
        seconds = timeout or self._timeout
        source = ObjectSource(f"{self.url}/{path}", timeout=seconds, retries=retries, **self._options)
        source.begin(timeout, retries, on_retry)
        source.share(None if is_lost() else self._connect(path, seconds), partial(self._on_loop, seconds))
        return source

    def _on_loop(self, seconds: float) -> LoopHttp:
        """Return what asks an http server on the loop that runs."""
        if (found := self._direct.get(seconds)) is None or not found.is_here:
            found = self._direct[seconds] = LoopHttp(self.url, seconds, Validator(None))
        return found

    def _connect(self, path: str, seconds: float) -> StoreClient:
        if seconds not in self._clients:
            try:
                self._clients[seconds] = StoreClient(self.url, self._options, seconds, self._proxy, key="")
            except ValueError as error:
                raise StoreError(self.name(path), 0, 0, f"this URL cannot be used: {error}") from error
        return self._clients[seconds].sibling(path)

    def _proxy(self) -> str | None:
        return proxy_of(self.url, self._options.get("client_options", {}))

    def size(self, path: str) -> int | None:
        """Return the bytes of an object, None if there is none. Raises SourceError if the store cannot be reached."""
        try:
            return self.part(path).size
        except SourceError as error:
            if _status(error) in _MISSING:
                return None
            raise

    def read(self, path: str, start: int, stop: int) -> Any:
        """Return the bytes [start, stop) of an object, fewer where it ends before. Raises SourceError."""
        part = self.part(path)
        pieces: list[Any] = []
        while start < stop:
            try:
                answer = part.ask(partial(_range, start, min(stop, start + _PIECE)))
            except SourceError as error:
                if _status(error) == _BEHIND_THE_END:
                    break
                raise
            pieces.append(answer.data)
            start += len(answer.data)
            if answer.validator.size == start or not len(answer.data):
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def put(self, path: str, parts: Iterable[Any], *, replace: bool = True, instead_of: bytes | None = None) -> bool:
        """Write an object; tell whether it was written. See `Folder.put`. `instead_of` is of one request's length."""
        if instead_of is not None:
            return self._swap(path, b"".join(parts), instead_of)
        if not replace and self.size(path) is not None:  # some stores ignore the condition of a put
            return False
        data = b"".join(parts)
        written: bool = self._writable(path).ask(lambda client: client.put(data, replace=replace))
        return written or self._is(path, data)

    def _swap(self, path: str, data: bytes, before: bytes) -> bool:
        """Write an object where it is as before; not where the store has another one by the time of the write."""
        try:
            found = self.part(path).ask(partial(_range, 0, len(before) + 1))
        except SourceError as error:
            if _status(error) in _MISSING:
                return False
            raise
        if found.data != before:
            return False
        writable = self._writable(path)
        written: bool = writable.ask(lambda client: client.put(data, replace=True, tag=found.validator.tag))
        return written or self._is(path, data)

    def _is(self, path: str, data: bytes) -> bool:
        """Tell whether an object that could not be written has been: the answer to a first try may have been lost."""
        return bytes(self.read(path, 0, len(data) + 1)) == data

    def list(self, path: str) -> Iterator[Entry]:
        """Yield the objects below a path. Raises SourceError."""
        yield from self._writable(path).ask(lambda client: [_entry(*item) for item in client.list()])

    def find(self, path: str) -> Entry | None:
        """Return what is known of an object of a bucket, None if there is none. Raises SourceError."""
        try:
            return _entry(path, *self._writable(path).ask(lambda client: client.head()))
        except SourceError as error:
            if _status(error) in _MISSING:
                return None
            raise

    def delete(self, path: str) -> None:
        """Remove an object; nothing if it is not there. Raises SourceError."""
        writable = self._writable(path)
        try:
            writable.ask(lambda client: client.delete())
        except SourceError:
            if self.size(path) is not None:  # some gateways delete it, and give an answer that obstore refuses
                raise

    def _writable(self, path: str) -> ObjectSource:
        if self._http:
            reason = "a store behind http can be read only: write to a bucket or a folder"
            raise StoreError(self.name(path), 0, 0, reason)
        return self.part(path, _WRITE_TIMEOUT)

    def close(self) -> None:
        """Close its connections, those on the loop that runs."""
        for each in self._direct.values():
            each.close()
        self._direct.clear()
        self._clients.clear()

    def __repr__(self) -> str:
        return f"Bucket({hide_secrets(self.url)!r})"


def _entry(path: str, size: int, modified: float) -> Entry:
    """Return what is known of an object. Its time is whole seconds: some stores tell no more if one is asked for."""
    return Entry(path, size, float(int(modified)))


def _range(start: int, stop: int, client: Any) -> Answer:
    """Ask for a range of an object that never changes."""
    answer: Answer = client.get(start, stop, None)
    return answer


def _status(error: SourceError) -> int:
    """Return the status of the answer that an error is about, 0 if there was none."""
    return error.__cause__.failure.status if isinstance(error.__cause__, RequestError) else 0
