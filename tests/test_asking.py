"""`pager.client.asking`: when a request is sent, and what becomes of one that cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from aiouffd.errors import PagerStartError
from aiouffd.pager.client.asking import Asking
from aiouffd.pager.client.waiting import Waiter, Watches
from aiouffd.pager.process import control

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.pager.client.pair import Pair


class FakePair:
    """Takes what is sent, or fails."""

    def __init__(self, error: Exception | None = None, *, full: bool = False) -> None:
        self.outbox = self
        self.worker_lives = error is None
        self.sent: list[str] = []
        self._error = error
        self._full = full

    def __bool__(self) -> bool:
        return self._full

    def put(self, message: dict[str, Any], _: list[int]) -> None:
        """As an Outbox does."""
        if self._error is not None:
            raise self._error
        self.sent.append(message["op"])
        self._number = message["id"]

    def flush(self) -> list[tuple[dict[str, Any], OSError]]:
        """As an Outbox does: the last cannot be sent."""
        return [({"op": self.sent[-1], "id": self._number}, OSError(9, "no such descriptor"))]


@pytest.fixture
def waiter() -> Iterator[Waiter]:
    """Return what the client's thread would wait with."""
    made = Waiter(Watches())
    yield made
    made.close()


def asking(waiter: Waiter, pair: FakePair) -> Asking:
    """Return what asks such a pair."""
    made = Asking(waiter)
    made.pair = cast("Pair", pair)
    return made


def test_a_worker_is_asked_for_nothing_before_it_has_taken_over(waiter: Waiter) -> None:
    """Then for all that waits, in an order that makes sense."""
    pair = FakePair()
    requests = asking(waiter, pair)
    requests.held = True
    for op in ("prefetch", "open", "takeover", "resume"):
        requests(op, token="a")
    assert pair.sent == ["takeover"]
    requests.forget([request for request in requests.pending if request.message["op"] == "takeover"])
    requests.held = False
    requests.resend()
    assert pair.sent == ["takeover", "resume", "open", "prefetch"]


def test_what_a_dead_pager_was_asked_for_waits_for_its_successor(waiter: Waiter) -> None:
    """A request that cannot be sent at all has failed."""
    requests = asking(waiter, FakePair(control.Closed()))
    waits = requests("open", token="a")
    refused = asking(waiter, FakePair(OSError(9, "too many")))("open", token="a")
    assert isinstance(refused.exception(0), PagerStartError)
    successor = FakePair()
    requests.pair = cast("Pair", successor)
    requests.resend()
    assert (successor.sent, waits.done()) == (["open"], False)


def test_what_cannot_be_sent_later_fails_alone(waiter: Waiter) -> None:
    """The others are waited for."""
    pair = FakePair(full=True)
    requests = asking(waiter, pair)
    waits, fails = (requests(op, token="a") for op in ("prefetch", "open"))
    requests.flush(cast("Pair", pair))
    assert isinstance(fails.exception(0), PagerStartError)
    assert (waits.done(), [request.message["op"] for request in requests.pending]) == (False, ["prefetch"])


def test_the_thread_is_woken_to_send_what_there_was_no_room_for(waiter: Waiter) -> None:
    """It waits for nothing else: not for the connection to be writable."""
    asking(waiter, FakePair())("open", token="a")
    assert not waiter.wait(0.001, -1)
    asking(waiter, FakePair(full=True))("open", token="a")
    assert waiter.wait(0.1, waiter.fileno())


def test_who_hears_a_request(waiter: Waiter) -> None:
    """Nobody before there is a pair, nor when its processes are dead."""
    assert not Asking(waiter).may_be_heard()
    assert asking(waiter, FakePair()).may_be_heard()
    assert not asking(waiter, FakePair(control.Closed())).may_be_heard()
