"""What becomes of the memory that a pager served whose keeper has died.

Its worker is an orphan then, and serves on. A new pair is started, and the orphan hands over to the new worker
directly: the thread that arranges this may not get the GIL in between, since the thread that holds it may wait for a
page. Where no orphan lives, the new worker begins with what the last journal says.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from aiouffd.errors import PagerStartError
from aiouffd.kernel.owned_descriptor import OwnedSocket
from aiouffd.lifetime import close_in_children
from aiouffd.pager.process import control
from aiouffd.pager.process.handles import close_all
from aiouffd.pager.process.replay import survey

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from aiouffd.pager.client.pair import Pair
    from aiouffd.pager.client.waiting import Waiter
    from aiouffd.pager.process.journal import Journal
    from aiouffd.pager.process.state import State
    from aiouffd.rpc import Requests

__all__ = ["Takeover"]

log: logging.Logger = logging.getLogger("aiouffd")

_PAUSES = (0.05, 0.2, 1.0, 5.0)  # seconds until what has failed is tried again
_STARTS = 5  # failed ones in a row, where no orphan lives, until the pager is given up


class Takeover:
    """Moves what orphans serve to the pair that succeeds them. Used by the client's thread.

    Args:
        requests: of the client, which sends them to the newest pair.
        start: starts a pair; raises as `successor` does.
        waiter: of the client's thread.
        reopen: called where no orphan lives, with the journal that says what is served, that journal's state, and the
            descriptors of forked children, by the identity of the space; its future is done when all is open.
        taken: called when the new worker has everything, or is asked for it; with a future: then it counts on.
        hear: called with each event that an orphan sent and nobody has read.
    """

    def __init__(
        self,
        requests: Requests,
        start: Callable[[], Pair],
        waiter: Waiter,
        *,
        reopen: Callable[[Journal, State | None, dict[int, int]], Future[Any]],
        taken: Callable[[Future[Any]], None],
        hear: Callable[[dict[str, Any]], None],
    ) -> None:
        self.orphans: list[Pair] = []  # oldest first
        self._requests = requests
        self._start = start
        self._waiter = waiter
        self._reopen = reopen
        self._taken = taken
        self._hear = hear
        self._failures = 0  # in a row
        self._due = math.inf  # when to try again

    @property
    def orphan_lives(self) -> bool:
        """Whether somebody serves while there is no pager."""
        return any(orphan.worker_lives for orphan in self.orphans)

    def successor(self, dead: Pair) -> Pair:
        """Return a new pair, in place of one whose keeper has died. Blocks, and tries again as long as that is useful.

        Raises:
            PagerStartError: none could be started, and nobody serves.
            StoppedError: the client is being stopped.
        """
        self.orphans.append(dead)
        self._requests.forget([item for item in self._requests.pending if item.message["op"] == "takeover"])
        self._due, self._failures = math.inf, 0
        try:
            for attempt in itertools.count():
                try:
                    return self._start()
                except PagerStartError as error:
                    if attempt >= _STARTS and not self.orphan_lives:
                        raise
                    log.warning("%s; tried again", error)
                self._waiter.wait(_PAUSES[min(attempt, len(_PAUSES) - 1)])
        except BaseException:
            self.orphans.remove(dead)  # it has no successor, and whoever has asked ends it
            raise
        raise AssertionError

    def begin(self) -> None:
        """Have the new worker take over from the oldest orphan that lives: it ends only when its successor has all."""
        orphan = next((orphan for orphan in self.orphans if orphan.worker_lives), None)
        if orphan is None:
            self._begin_from_journal()
            return
        try:
            theirs, ours = map(close_in_children, OwnedSocket.pair(socket.SOCK_SEQPACKET))
        except OSError as error:  # this process has too many files open
            self._later(error)
            return
        try:
            with theirs:
                control.send(orphan.connection, {"op": "handover", "id": 0}, [theirs.fileno()], wait=False)
        except (control.Closed, OSError) as error:  # it has just ended; or its loop does not turn
            ours.close()
            self._later(error)
            return
        future = self._requests("takeover", [ours.fileno()])

        def done(future: Future[Any]) -> None:
            ours.close()
            error = future.exception()
            if error is None:
                self._finish(future)
            elif not self._waiter.stopped:
                self._later(error)

        future.add_done_callback(done)

    def continue_if_due(self) -> None:
        """Try again what has failed, if it is time."""
        if time.monotonic() >= self._due:
            self._due = math.inf
            self.begin()

    @property
    def patience(self) -> float:
        """Seconds until `continue_if_due` is to be called; infinite: it need not be."""
        return max(0.0, self._due - time.monotonic())

    def _later(self, error: BaseException) -> None:
        if not self.orphan_lives:
            self._begin_from_journal()
            return
        self._due = time.monotonic() + _PAUSES[min(self._failures, len(_PAUSES) - 1)]
        self._failures += 1
        log.warning("the worker without a keeper serves on (%s); tried again", error)

    def _begin_from_journal(self) -> None:
        """All workers that have served are dead: the newest journal that was used says what is shown.

        Not that of a worker which was still waiting for the end of its predecessor: that may have served on since.
        """
        states = [(survey(orphan.journal), orphan) for orphan in reversed(self.orphans)]
        known = [item for item in states if item[0] is not None]
        used = [item for item in known if item[0] is not None and item[0].meta.awaits < 0]
        state, orphan = (used or known or states[-1:])[0]
        children: dict[int, int] = {}
        for each in self.orphans:  # the newest has not put in all, perhaps; they have the same numbers
            taken = each.vault.take()
            close_all(children.pop(number) for number in taken.keys() & children.keys())
            children |= taken
        self._finish(self._reopen(orphan.journal, state, children))

    def _finish(self, counts: Future[Any]) -> None:
        self.close()
        self._taken(counts)

    def close(self, *, kill: bool = False) -> None:
        """Be done with the orphans; what they had still to say is heard."""
        orphans, self.orphans = self.orphans, []
        for orphan in orphans:
            if kill:
                orphan.kill_worker()
            with contextlib.suppress(control.Closed, OSError):
                while not self._waiter.stopped:
                    orphan.connection.setblocking(False)
                    message, fds = control.receive(orphan.connection)
                    for fd in fds:
                        os.close(fd)
                    if message.get("event") in ("error", "gone"):
                        self._hear(message)
            orphan.close()
