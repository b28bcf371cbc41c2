"""`pager.client.forks`: a fork right after the death of those that would read of it."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import pytest
from pattern import PAGE, Pattern, peek, word
from scenario import play

import aiouffd
from aiouffd.errors import ClosedError, PagerDiedError
from aiouffd.kernel.abi import Feature
from aiouffd.pager.client import forks
from aiouffd.pager.client.forks import await_readers
from aiouffd.pager.process import deaths

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.pager.client.client import PagerClient

FORKS = 12
SIZE = 4 * FORKS * PAGE


class FakeClient:
    """Serves one tenant, and answers when it is told to."""

    def __init__(self, features: Feature = Feature.EVENT_FORK, error: Exception | None = None) -> None:
        self.tenants = [self]
        self.uffd = self
        self.features = features
        self.may_wait = True
        self.lives = lambda: False
        self.lost = 0
        self.asked = threading.Event()
        self.answer: Future[Any] = Future()
        self._error = error

    def ping(self) -> Future[Any]:
        """As a client does."""
        self.asked.set()
        if self._error is not None:
            raise self._error
        return self.answer

    def lose(self) -> None:
        """As a client does."""
        self.lost += 1


def waits_for(client: FakeClient, end: Callable[[], object], seconds: float = 0.05) -> bool:
    """Tell whether a fork is made only after `end` was called, so many seconds later."""
    done = threading.Event()

    def fork() -> None:
        await_readers([cast("PagerClient", client)])
        done.set()

    thread = threading.Thread(target=fork)
    thread.start()
    client.asked.wait()
    waited = not done.wait(seconds)
    end()
    thread.join()
    return waited


def test_a_fork_waits_for_an_answer() -> None:
    """Where the pager was given up, there is none, and the memory is settled."""
    client = FakeClient()
    assert waits_for(client, lambda: client.answer.set_result(None))
    client = FakeClient()
    assert waits_for(client, lambda: client.answer.set_exception(PagerDiedError("gone")))
    assert client.lost == 1
    for error in (PagerDiedError("gone"), ClosedError("left")):
        client = FakeClient(error=error)
        await_readers([cast("PagerClient", client)])
        assert client.lost == 1


def test_a_fork_that_is_not_told_waits_for_nobody() -> None:
    """The region is not the child's; or the thread that forks can get no answer."""
    client, busy = FakeClient(Feature(0)), FakeClient()
    busy.may_wait = False
    await_readers([cast("PagerClient", client), cast("PagerClient", busy)])
    assert not client.asked.is_set()
    assert not busy.asked.is_set()


def test_a_pager_that_lives_and_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would hear it may need a lock that this thread has, in a signal handler. A dead one is waited for."""
    monkeypatch.setattr(forks, "_PATIENCE", 0.01)
    client = FakeClient()
    assert waits_for(client, lambda: client.answer.set_result(None))
    client = FakeClient()
    client.lives = lambda: True
    assert not waits_for(client, lambda: client.answer.set_result(None), 20.0)


def forks_when_all_are_dead(kills: str) -> None:
    """Scenario: each child reads the right bytes."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), fork="serve", readahead=0) as monitor:
        for turn in range(FORKS):
            for which in kills:
                os.kill(monitor.pids[int(which)], signal.SIGKILL)
            child = os.fork()
            pages = range(turn * 4, turn * 4 + 2)
            if not child:
                os._exit(0 if all(peek(region.address + page * PAGE) == word(page) for page in pages) else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert peek(region.address + (turn * 4 + 3) * PAGE) == word(turn * 4 + 3)
        monitor.check()


@pytest.mark.parametrize("kills", ["10", "01"])
def test_a_fork_right_after_the_death_of_keeper_and_worker(kills: str) -> None:
    """The fork holds the GIL in the kernel, and a thread that wants it starts the others."""
    play(forks_when_all_are_dead, kills)


def forks_when_it_is_given_up() -> None:
    """Scenario: the last keeper dies, no other is started, and the process forks at once."""
    deaths.DEATHS = 1  # type: ignore[misc]
    deaths.KILLED = 0.0  # type: ignore[misc]
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), fork="serve") as monitor:
        for pid in reversed(monitor.pids):
            os.kill(pid, signal.SIGKILL)
        child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(PagerDiedError):
            monitor.check()


def test_a_fork_when_the_pager_is_given_up() -> None:
    """It waits until the memory has been settled: the thread that does so wants the GIL."""
    play(forks_when_it_is_given_up)
