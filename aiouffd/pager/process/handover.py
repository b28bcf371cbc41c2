"""From a worker whose keeper is dead to that of another keeper.

One of the two workers reads messages, at any moment; which one does not depend on an answer that may be lost: the
successor serves when its predecessor is gone, and a predecessor that goes on after all says so before it lets go of the
socket. What is served is in the predecessor's journal, which goes over with the descriptors.

The successor asks for it twice: for what it has to open or build, and may have to import for, while the predecessor
serves on; and when that is there. It may die at any moment, and another worker goes on with the same socket: so each
answer says whom it is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from aiouffd.errors import ClosedError
from aiouffd.pager.process import control
from aiouffd.pager.process.handles import close_all
from aiouffd.pager.process.journal import Journal
from aiouffd.pager.process.replay import Replay, survey
from aiouffd.pager.process.served import or_end
from aiouffd.pager.process.state import State
from aiouffd.pager.process.tenancy import BUILD_TIMEOUT

if TYPE_CHECKING:
    from aiouffd.pager.process.served import Served
    from aiouffd.pager.process.tenancy import Origin

__all__ = ["Handover"]

log: logging.Logger = logging.getLogger("aiouffd.pager")

_TIMEOUT = 10.0  # seconds in which nothing is read: twice as long with each try that has failed


class Handover:
    """Both sides of it."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._task: asyncio.Task[None] | None = None
        self._patience = _TIMEOUT

    # The predecessor

    async def give(self, fd: int) -> None:
        """Give everything to the worker of another keeper, over a socket; serve until that worker is ready.

        A worker whose own predecessor died before it had given anything ends: the client knows what is to be served.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._served.is_empty:
            os.close(fd)
            self._served.journal.done = True
            os._exit(0)
        with socket.socket(fileno=fd) as successor, contextlib.suppress(control.Closed, OSError):
            successor.settimeout(self._patience)
            asked = await _heard(successor)
            while True:
                self._hand(successor, asked["by"])
                if not asked["built"]:
                    asked = await _heard(successor)
                    continue
                try:  # nothing is read meanwhile
                    asked, _ = control.receive(successor)
                except (control.Closed, OSError) as error:
                    self._patience *= 2 if isinstance(error, TimeoutError) else 1
                    control.send(successor, {"keep": True})
                    break
                if "taken" in asked:
                    self._served.journal.change(0)  # else a holder would give it once more
                    self._served.journal.done = True
                    successor.close()  # a holder has it, too, and the end of this process does not close it
                    os._exit(0)
        log.warning("the successor has not taken over: serving on")

    def _hand(self, successor: socket.socket, to: int) -> None:
        state = self._served.state()
        along = sorted(state.numbers)
        control.send(successor, {"to": to, "numbers": along}, [self._served.journal.fd, *along])

    # The successor

    async def take(self, fd: int) -> None:
        """Take everything over from a worker whose keeper is dead; `Closed` where that worker has died, too."""
        if self._task is None or self._task.done():
            if not self._served.is_empty:  # a worker before this one has taken it over, and died
                os.close(fd)
                return
            self._task = asyncio.get_running_loop().create_task(self._take(fd))
        else:  # sent again
            os.close(fd)
        await asyncio.shield(self._task)

    async def _take(self, predecessor: int) -> None:
        served, received = self._served, list[int]()
        with socket.socket(fileno=predecessor) as connection:
            connection.settimeout(_TIMEOUT)
            try:
                state, _ = await _asked(connection, received, built=False)
                built = await self._build(state)
                close_all(received)
                received.clear()
                state, journal = await _asked(connection, received, built=True)
                # Durable before it is acknowledged: should this worker die now, the next one waits for the same end.
                state.meta.awaits = connection.fileno()
                served.write_all(state)
            except BaseException:
                close_all(received)
                raise
            served.journal.take_counters(journal)
            if not await self.is_left_to_us(connection, state):
                raise ClosedError("the predecessor serves on")
            with or_end():
                served.restore(Replay(state), -1, built)
                served.note_meta()

    async def _build(self, state: State) -> dict[int, Origin]:
        """Open all sources at the same time: one that does not answer delays the others, but no page of theirs."""
        numbers = list(state.origins)
        built = await asyncio.gather(*(self._served.rebuilt(number, state.origins[number]) for number in numbers))
        return dict(zip(numbers, built, strict=True))

    async def is_left_to_us(self, predecessor: socket.socket, state: State) -> bool:
        """Tell the predecessor that all is here, and wait for its end; return whether it has ended, or serves on."""
        with contextlib.suppress(control.Closed, OSError):  # told before, by a worker that has died since
            control.send(predecessor, {"taken": True})
        while True:
            await _readable(predecessor, None)
            try:
                message, fds = control.receive(predecessor)
            except control.Closed:
                return True
            close_all(fds)  # an answer to a worker that has died
            if message.get("keep"):
                self._served.journal.change(0)  # it says nothing, as if there had been no predecessor
                close_all(state.numbers - {state.meta.awaits})
                return False


async def _readable(connection: socket.socket, seconds: float | None) -> None:
    """Wait until something can be received; TimeoutError (an OSError) after `seconds`."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(connection.fileno(), event.set)
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    finally:
        loop.remove_reader(connection.fileno())


async def _heard(successor: socket.socket) -> dict[str, Any]:
    """Return what a successor asks for next."""
    await _readable(successor, BUILD_TIMEOUT + _TIMEOUT)
    return control.receive(successor)[0]


async def _asked(connection: socket.socket, received: list[int], *, built: bool) -> tuple[State, Journal]:
    """Ask for a state, and return it, with the journal that has its counters.

    Its descriptors are added to `received`; it has their numbers here.
    """
    control.send(connection, {"by": os.getpid(), "built": built})
    while True:
        await _readable(connection, _TIMEOUT if built else BUILD_TIMEOUT)  # it may be taking over itself
        message, fds = control.receive(connection)
        if message.get("to") == os.getpid():
            break
        close_all(fds)  # an answer to a worker that has died
    received += fds
    journal = Journal(fds[0])
    state = survey(journal) or State()
    state.renumber(dict(zip(message["numbers"], fds[1:], strict=True)))
    os.close(received.pop(-len(fds)))  # the journal's
    return state, journal
