"""`rpc`: requests, and whatever the other side answers."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from aiouffd.errors import ClosedError, HandoffError, PagerError, SourceError, encode_error
from aiouffd.rpc import Request, Requests, all_of


class Peer:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[Request] = []
        self.requests = Requests("the peer", self.sent.append)


def test_an_answer_completes_its_request() -> None:
    """Answers may come in any order; each goes to the request whose number it has."""
    peer = Peer()
    first, second = peer.requests("one", length=1), peer.requests("two", [7])
    assert [item.message for item in peer.sent] == [{"op": "one", "id": 1, "length": 1}, {"op": "two", "id": 2}]
    assert list(peer.sent[1].fds) == [7]
    peer.requests.answer({"id": 2, "ok": None})
    peer.requests.answer({"id": 1, "error": encode_error(SourceError("s", 1, 2, "why"))})
    assert second.result(0) is None
    with pytest.raises(SourceError, match="why"):
        first.result(0)
    assert not peer.requests.pending


def test_an_answer_to_a_canceled_request_is_dropped() -> None:
    """Whether it is a value, an error, or malformed; and it is not sent again."""
    peer = Peer()
    futures = [peer.requests("op") for _ in range(3)]
    for future in futures:
        future.cancel()
    peer.requests.answer({"id": 1, "ok": 1})
    peer.requests.answer({"id": 2, "error": encode_error(OSError(5, "x"))})
    with pytest.raises(HandoffError):
        peer.requests.answer({"id": 3})
    assert not peer.requests.pending


def test_a_canceled_request_is_not_pending() -> None:
    """A successor is not asked for what nobody waits for."""
    peer = Peer()
    peer.requests("op").cancel()
    kept = peer.requests("op")
    assert [item.future for item in peer.requests.pending] == [kept]


def test_late_and_repeated_answers_are_dropped() -> None:
    """A number that was never given, and one that was answered before."""
    peer = Peer()
    future = peer.requests("op")
    peer.requests.answer({"id": 1, "ok": "first"})
    peer.requests.answer({"id": 1, "ok": "second"})
    peer.requests.answer({"id": 99, "error": "nonsense"})
    assert future.result(0) == "first"


@pytest.mark.parametrize("message", [None, [], "text", 7, {}, {"ok": 1}, {"id": "1", "ok": 1}, {"id": True, "ok": 1}])
def test_what_is_no_answer_is_an_error(message: Any) -> None:
    """It names no request: a typed error for the reader, and the requests wait on."""
    peer = Peer()
    future = peer.requests("op")
    with pytest.raises(HandoffError, match="the peer"):
        peer.requests.answer(message)
    assert not future.done()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"error": None},
        {"error": "text"},
        {"error": {}},
        {"error": {"type": 7}},
        {"error": {"type": "SourceError", "text": "", "trace": "", "cause": None}},
        {"error": {"type": "ExceptionGroup", "args": ["", []], "text": "", "trace": "", "cause": None}},
        {"error": {"type": "OSError", "args": [1, "x"], "text": "", "trace": "", "cause": 7}},
    ],
)
def test_a_malformed_answer_fails_its_request(answer: dict[str, Any]) -> None:
    """Its request gets the same typed error as the reader; the others are not touched."""
    peer = Peer()
    future, other = peer.requests("op"), peer.requests("other")
    with pytest.raises(HandoffError):
        peer.requests.answer({"id": 1, **answer})
    with pytest.raises(HandoffError):
        future.result(0)
    assert not other.done()


async def test_no_error_keeps_a_coroutine_waiting() -> None:
    """A future of asyncio refuses StopIteration."""
    peer = Peer()
    future = asyncio.wrap_future(peer.requests("op"))
    peer.requests.answer({"id": 1, "error": encode_error(StopIteration())})
    with pytest.raises(PagerError):
        await asyncio.wait_for(future, 60)


def test_closed_requests_fail() -> None:
    """Those under way and those to come, with the first reason."""
    peer = Peer()
    future, canceled = peer.requests("op"), peer.requests("op")
    canceled.cancel()
    peer.requests.close(ClosedError("left"))
    peer.requests.close(ClosedError("again"))
    with pytest.raises(ClosedError, match="left"):
        future.result(0)
    with pytest.raises(ClosedError, match="left"):
        peer.requests("op")
    assert len(peer.sent) == 2


def test_a_request_that_cannot_be_sent_is_forgotten() -> None:
    """Its error is the caller's."""

    def refuse(_: Request) -> None:
        raise ClosedError("gone")

    requests = Requests("the peer", refuse)
    with pytest.raises(ClosedError):
        requests("op")
    assert not requests.pending


def test_many_threads_ask() -> None:
    """Each request has a number of its own, and is sent in that order."""
    peer = Peer()
    threads = [threading.Thread(target=lambda: [peer.requests("op") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [item.message["id"] for item in peer.sent] == list(range(1, 2001))


def test_some_requests_fail() -> None:
    """Their answers are dropped then; the others wait on."""
    peer = Peer()
    first, second = peer.requests("one"), peer.requests("two")
    peer.requests.fail(peer.sent[:1], ClosedError("left"))
    with pytest.raises(ClosedError, match="left"):
        first.result(0)
    assert [item.future for item in peer.requests.pending] == [second]
    peer.requests.answer({"id": 1, "ok": 1})
    peer.requests.answer({"id": 2, "ok": 2})
    assert second.result(0) == 2


def test_all_of_some_requests() -> None:
    """They are done with the last, failed with the first that fails, and done at once if there are none."""
    first, second, third = [Future[Any]() for _ in range(3)]
    assert all_of([first]) is first
    assert all_of([]).done()
    both, failing = all_of([first, second]), all_of([first, third, second])
    first.set_result(1)
    assert not both.done()
    third.set_exception(ClosedError("left"))
    assert isinstance(failing.exception(0), ClosedError)
    second.set_result(2)
    assert both.done()
    assert both.exception(0) is None
