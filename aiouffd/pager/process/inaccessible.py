"""Pages that cannot be had, where the kernel has no UFFDIO_POISON (before Linux 6.6).

Only the process itself can make a page inaccessible: mprotect(2) works on no other process. So its client's thread is
asked to. If that does not answer, the thread that waits for the page holds the GIL, and the process is ended: no hang.
A forked child has no such thread: it waits, and the log says so.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

from aiouffd.engine.allowance import MeteredUserfaultfd
from aiouffd.engine.resolver import DONTWAKE
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aiouffd.pager.process.state import SpaceState

__all__ = ["AskingUserfaultfd", "Protection"]

log: logging.Logger = logging.getLogger("aiouffd.pager")

PATIENCE = 5.0
"""Seconds for the process to make a page inaccessible; as many as `Pager.stuck_limit` has by default."""

_GRACE = 2.0  # seconds more, for a process that catches SIGBUS


class AskingUserfaultfd(Userfaultfd):
    """Has a page made inaccessible where the kernel cannot poison it.

    The kernel says so when it is asked to poison: to ask it beforehand takes a userfaultfd of one's own, which a pager
    in a container may not open.
    """

    ask: Callable[[int, int], None] | None = None
    """Called with start and length of what cannot be had; None: nobody can be asked."""

    def try_poison(self, start: int, length: int, mode: int) -> int:
        """As UFFDIO_POISON, perhaps later; the question whether a page is missing is refused as by the kernel."""
        result = super().try_poison(start, length, mode)
        if result != -errno.EINVAL or self.ask is None or mode & DONTWAKE:
            return result
        self.ask(start, length)
        return length


class Protection:
    """Asks the owner's client to make pages inaccessible. Used on the worker's loop.

    Args:
        loop: the worker's.
        tell: sends an event to the client.
        owner: returns the pidfd of the process that has started the pager; -1: not known yet.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, tell: Callable[[dict[str, Any]], object], owner: Callable[[], int]
    ) -> None:
        self._loop = loop
        self._tell = tell
        self._owner = owner
        self._asked: dict[int, asyncio.TimerHandle] = {}  # by the address of the page

    def userfaultfd(self, state: SpaceState, *, metered: bool) -> Userfaultfd:
        """Return the descriptor of a space; `metered`: of a client that is limited, and cannot be asked."""
        if metered:
            return MeteredUserfaultfd.from_fd(state.fd, Feature(state.features))
        if not state.own:
            return Userfaultfd.from_fd(state.fd, Feature(state.features))
        uffd = AskingUserfaultfd.from_fd(state.fd, Feature(state.features))
        uffd.ask = partial(self._ask, state.token)
        return uffd

    def _ask(self, token: str, start: int, length: int) -> None:
        if start not in self._asked:
            self._asked[start] = self._loop.call_later(PATIENCE, self._end, start, signal.SIGBUS)
            self._tell({"event": "protect", "token": token, "start": start, "length": length})

    def done(self, start: int) -> None:
        """The client has answered."""
        if (timer := self._asked.pop(start, None)) is not None:
            timer.cancel()

    def _end(self, start: int, number: signal.Signals) -> None:
        log.critical(
            "the page at %#x cannot be had, and its process cannot make it inaccessible: the thread that waits for it"
            " holds the GIL. The process is ended (%s)",
            *(start, number.name),
        )
        with contextlib.suppress(OSError):  # it has ended
            signal.pidfd_send_signal(self._owner(), number)
        self._asked[start] = self._loop.call_later(_GRACE, self._end, start, signal.SIGKILL)
