"""`takeover`: another pair is started in place of one whose keeper has died, and gets what that one served."""

from __future__ import annotations

import errno
import logging
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import aiouffd
from aiouffd.kernel.owned_descriptor import OwnedSocket
from aiouffd.pager.client.takeover import Takeover
from aiouffd.pager.process.handles import close_all
from aiouffd.pager.process.journal import Journal
from aiouffd.pager.process.state import Meta, State

if TYPE_CHECKING:
    from collections.abc import Callable


class Orphan:
    """A pair whose keeper is dead."""

    def __init__(self, *, lives: bool) -> None:
        self.worker_lives = lives
        self.journal = Journal.create()
        self.vault = SimpleNamespace(take=dict)
        self.closed = False
        self.connection = SimpleNamespace(setblocking=self._no_more)

    def _no_more(self, _: bool) -> None:
        raise BlockingIOError

    def kill_worker(self) -> None:
        """Kill it."""
        self.worker_lives = False

    def close(self) -> None:
        """Close it."""
        self.closed = True


def makes(start: Callable[[], Any], told: list[Any]) -> Takeover:
    """Return one that notes what it calls and how long it waits."""
    waiter: Any = SimpleNamespace(stopped=False, wait=told.append)
    requests: Any = SimpleNamespace(pending=[], forget=told.append)
    opened: Any = object()

    def reopen(*args: Any) -> Any:
        told.append(args)
        return opened

    return Takeover(
        requests,
        start,
        waiter,
        reopen=reopen,
        taken=lambda future: told.append("taken" if future is opened else future),
        hear=told.append,
    )


def test_starting_is_tried_again_with_longer_pauses(caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody serves, it is given up after the sixth try."""
    told: list[Any] = []

    def fail() -> Any:
        raise aiouffd.PagerStartError("no processes")

    takeover = makes(fail, told)
    dead: Any = Orphan(lives=False)
    with caplog.at_level(logging.WARNING), pytest.raises(aiouffd.PagerStartError, match="no processes"):
        takeover.successor(dead)
    assert not takeover.orphans
    assert told[1:] == [0.05, 0.2, 1.0, 5.0, 5.0]
    assert caplog.text.count("tried again") == 5


def test_it_is_not_given_up_while_somebody_serves() -> None:
    """However often it fails."""
    told: list[Any] = []
    tries = iter([None] * 20)

    def start() -> Any:
        if next(tries, "started") is None:
            raise aiouffd.PagerStartError("no processes")
        return "pair"

    orphan: Any = Orphan(lives=True)
    takeover = makes(start, told)
    pair: Any = takeover.successor(orphan)
    assert pair == "pair"
    assert len(told) == 1 + 20
    assert takeover.orphan_lives


def test_no_descriptor_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again, while the orphan serves."""
    told: list[Any] = []
    takeover = makes(lambda: None, told)
    orphan: Any = Orphan(lives=True)
    takeover.orphans.append(orphan)

    def full(_: int) -> Any:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(OwnedSocket, "pair", full)
    takeover.begin()
    assert (takeover.orphans, told) == ([orphan], [])
    assert takeover.patience < 1


def test_where_no_orphan_lives_the_journal_says_what_is_shown() -> None:
    """The newest that was used; then all orphans are closed, and the client is told."""
    told: list[Any] = []
    takeover = makes(lambda: None, told)
    first: Any = Orphan(lives=False)
    second: Any = Orphan(lives=False)
    takeover.orphans += [first, second]
    takeover.begin()
    assert [item if item == "taken" else item[0] for item in told] == [told[0][0], "taken"]
    assert told[0][0] in (first.journal, second.journal)
    assert first.closed
    assert second.closed
    assert not takeover.orphans
    assert takeover.patience == float("inf")


def test_children_are_found_whichever_pair_has_kept_them() -> None:
    """One that was killed right after it had taken over has put in none of them yet, or some."""
    told: list[Any] = []
    takeover = makes(lambda: None, told)
    orphans: list[Any] = [Orphan(lives=False), Orphan(lives=False)]
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
    orphans[0].vault.take = lambda: {1: fds[0], 2: fds[1]}
    orphans[1].vault.take = lambda: {2: fds[2], 3: fds[3]}
    takeover.orphans += orphans
    takeover.begin()
    assert told[0][2] == {1: fds[0], 2: fds[2], 3: fds[3]}
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fds[1])
    close_all(told[0][2].values())


def test_a_successor_that_was_still_waiting_says_nothing() -> None:
    """Its predecessor may have served on, and has the newer journal then; what both say is better than nothing."""
    for waiting, newest in (((-1, 5), 0), ((-1, -1), 1), ((5, 5), 1)):
        told: list[Any] = []
        takeover = makes(lambda: None, told)
        orphans: list[Any] = [Orphan(lives=False), Orphan(lives=False)]
        for orphan, awaits in zip(orphans, waiting, strict=True):
            orphan.journal.change(orphan.journal.write_anew(0, State(Meta(awaits=awaits)).encode()))
        takeover.orphans += orphans
        takeover.begin()
        assert told[0][0] is orphans[newest].journal
