"""What is asked of a pager, whichever pair of processes it is at the moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiouffd.errors import PagerStartError
from aiouffd.pager.process import control
from aiouffd.rpc import Request, Requests

if TYPE_CHECKING:
    from concurrent.futures import Future

    from aiouffd.pager.client.pair import Pair
    from aiouffd.pager.client.waiting import Waiter
    from aiouffd.pager.process.journal import Journal

__all__ = ["Asking"]

_FIRST = ("takeover", "resume", "keep", "open")  # sent before the requests that speak of what these bring


def _rank(request: Request) -> int:
    op = request.message["op"]
    return _FIRST.index(op) if op in _FIRST else len(_FIRST)


class Asking(Requests):
    """The requests of a pager's client, which are sent to the newest pair. Thread-safe.

    Args:
        waiter: of the client's thread, which sends what there is no room for yet.

    Attributes:
        pair: where they are sent; None: nothing is.
        held: until the successor has taken over: one that serves anything would take over nothing.
        counting: the journal of the pair that serves, which is the one before until the newest counts on.
    """

    def __init__(self, waiter: Waiter) -> None:
        super().__init__("the pager", self._send_unless_held)
        self._waiter = waiter
        self.pair: Pair | None = None
        self.held: bool = False
        self.counting: Journal | None = None

    def release(self, counts: Future[Any]) -> None:
        """Ask the newest pair for what was held: it has taken over, or is to open all; when that is done, it counts."""
        with self.lock:
            self.held = False
            self.resend()
            pair = self.pair

        def counting(_: Future[Any]) -> None:
            if pair is not None and pair is self.pair:  # else it has been succeeded itself
                self.counting = pair.journal

        counts.add_done_callback(counting)

    def _send_unless_held(self, request: Request) -> None:
        if not self.held or request.message["op"] == "takeover":
            self.send(request)

    def send(self, request: Request) -> None:
        """Send a request, or have it sent when there is room; what cannot be sent at all has failed."""
        if self.pair is None or request.future.done():  # canceled: its descriptors may be closed
            return
        try:
            self.pair.outbox.put(request.message, list(request.fds))
        except control.Closed:
            return  # the pager is gone: sent again to its successor
        except OSError as error:
            self._fail(request.message, error)
            return
        if self.pair.outbox:
            self._waiter.wake()

    def flush(self, pair: Pair) -> None:
        """Send what there was no room for. Raises control.Closed: the pager is gone."""
        with self.lock:
            for message, error in pair.outbox.flush():
                self._fail(message, error)

    def _fail(self, message: dict[str, Any], error: OSError) -> None:
        """Have one request fail; the others are sent."""
        reason = PagerStartError(f"{message['op']} cannot be sent to the pager: {error}")
        self.fail([request for request in self.pending if request.message["id"] == message["id"]], reason)

    def may_be_heard(self) -> bool:
        """Tell whether somebody holds the other end of the connection."""
        return self.pair is not None and self.pair.worker_lives

    def resume(self) -> None:
        """Have the processes go on, if they were stopped."""
        if self.pair is not None:
            self.pair.resume()

    def resend(self) -> None:
        """Send all that is not answered yet, in an order that makes sense."""
        with self.lock:
            for request in sorted(self.pending, key=_rank):
                self._send_unless_held(request)
