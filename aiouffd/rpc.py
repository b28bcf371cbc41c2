"""Requests over a connection, and the futures that their answers complete.

One client for whatever answers requests on a connection: a pager, or a server. It knows no transport: `transmit` sends
a request, and whoever reads the connection gives each message that is an answer to `Requests.answer`.

An answer is `{"id": number, "ok": value}` or `{"id": number, "error": error}`, the error as `errors.encode_error`
writes it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.errors import HandoffError, PagerError, decode_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["LAST_REQUEST", "Request", "Requests", "all_of"]

LAST_REQUEST = 2.0
"""Seconds for the answers to what is asked on leaving. The memory is settled without them, too."""


@attrs.define(eq=False, repr=False)
class Request:
    """A request without an answer.

    Attributes:
        message: what is sent: `id`, `op` and the arguments.
        fds: descriptors that are sent along. They stay the caller's, who keeps them open until the future is done.
        future: completed by the answer. The caller may cancel it at any time; the answer is dropped then.
    """

    message: dict[str, Any]
    fds: Sequence[int] = ()
    future: Future[Any] = attrs.field(factory=Future)

    def fail(self, error: BaseException) -> None:
        """Set the exception of the future, unless it is done or canceled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


class Requests:
    """The requests of one client. Thread-safe.

    Args:
        peer: who answers, as text; for errors.
        transmit: sends a request, or keeps it to be sent later. Called with `lock` held, so that requests are sent in
            the order of their numbers. What it raises is raised to the caller, and the request is forgotten.
        first: the number of the first request.

    Attributes:
        lock: held while a request is numbered and sent. Reentrant.
    """

    def __init__(self, peer: str, transmit: Callable[[Request], None], *, first: int = 1) -> None:
        self.lock: threading.RLock = threading.RLock()
        self._peer = peer
        self._transmit = transmit
        self._numbers = itertools.count(first)
        self._pending: dict[int, Request] = {}
        self._closed: BaseException | None = None

    def __call__(self, op: str, fds: Sequence[int] = (), **arguments: Any) -> Future[Any]:
        """Send a request; the future completes with its answer. Canceling the future is safe.

        Raises:
            UffdError: what `close` was given: nobody can be asked any more.
        """
        with self.lock:
            if self._closed is not None:
                raise self._closed
            request = self.expect(op, fds, **arguments)
            try:
                self._transmit(request)
            except BaseException:
                self._pending.pop(request.message["id"], None)
                raise
        return request.future

    def expect(self, op: str, fds: Sequence[int] = (), **arguments: Any) -> Request:
        """Return a new request that waits for its answer and is not sent."""
        with self.lock:
            number = next(self._numbers)
            request = self._pending[number] = Request({"op": op, "id": number, **arguments}, fds)
        return request

    @property
    def is_busy_here(self) -> bool:
        """Whether this thread holds the lock: a signal handler or a finalizer finds that, and can get no answer."""
        return bool(self.lock._is_owned())  # type: ignore[attr-defined]  # noqa: SLF001 - as threading.Condition asks

    @property
    def pending(self) -> list[Request]:
        """The requests without an answer that somebody waits for, oldest first. Canceled ones are forgotten."""
        with self.lock:
            self._pending = {number: item for number, item in self._pending.items() if not item.future.done()}
            return list(self._pending.values())

    def forget(self, requests: Iterable[Request]) -> None:
        """Drop requests; their futures are not completed."""
        with self.lock:
            for request in requests:
                self._pending.pop(request.message["id"], None)

    def fail(self, requests: Iterable[Request], error: BaseException) -> None:
        """Drop requests; their futures get an error."""
        failed = list(requests)
        self.forget(failed)
        for request in failed:
            request.fail(error)

    def answer(self, message: Any) -> None:
        """Complete the future that a message answers; an answer that nobody waits for is dropped.

        Raises:
            HandoffError: the message is no answer. If it names a request, that request fails with the same error.
        """
        number = message.get("id") if isinstance(message, dict) else None
        if type(number) is not int:
            raise HandoffError(self._peer, f"sent {message!r:.80}, which is no answer")
        with self.lock:
            request = self._pending.pop(number, None)
        if request is None:
            return
        if "error" not in message and "ok" not in message:
            malformed = HandoffError(self._peer, f"answered {request.message['op']!r} with {message!r:.80}")
            request.fail(malformed)
            raise malformed
        if "error" not in message:
            with contextlib.suppress(InvalidStateError):  # canceled
                request.future.set_result(message["ok"])
            return
        try:
            request.fail(self.error(message["error"]))
        except HandoffError as error:
            request.fail(error)
            raise

    def error(self, data: Any) -> BaseException:
        """Decode an error that the peer sent.

        Raises:
            HandoffError: it is no error.
        """
        try:
            error = decode_error(data)
        except Exception as reason:
            raise HandoffError(self._peer, f"sent {data!r:.80}, which is no error") from reason
        # An asyncio future refuses a StopIteration, and whoever awaits it would wait for ever.
        return PagerError(repr(error)) if isinstance(error, StopIteration) else error

    def close(self, error: BaseException) -> None:
        """Fail all requests with an error, now and from now on. A second call changes nothing."""
        with self.lock:
            if self._closed is None:
                self._closed = error
            pending, self._pending = self._pending, {}
        for request in pending.values():
            request.fail(error)


def all_of(futures: Sequence[Future[Any]]) -> Future[Any]:
    """Return a future that is done when all of some are, or when one has failed."""
    if len(futures) == 1:
        return futures[0]
    whole: Future[Any] = Future()
    left = itertools.count(len(futures) - 1, -1)

    def done(future: Future[Any]) -> None:
        with contextlib.suppress(InvalidStateError):
            if (error := future.exception()) is not None:
                whole.set_exception(error)
            elif not next(left):
                whole.set_result(None)

    for future in futures:
        future.add_done_callback(done)
    if not futures:
        whole.set_result(None)
    return whole
