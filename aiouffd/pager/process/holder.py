"""The holder: a third process of a pager, for the case that all others are killed, its owner's included.

It is made as the worker is, with clone(CLONE_FILES): it shares the keeper's table of descriptors, and the journal,
which says what they are. So there is no moment at which a descriptor is the worker's and not the holder's: that of a
forked child is in the holder's table when the kernel has told of the fork. The holder does nothing else.

Whoever is to serve next asks at the holder's socket. A *look* tells what is served, while it is served. To *take* it
is to end keeper and worker, which loses nothing, and to be given the journal as it is then. So an upgrade and a total
loss are the same to the successor. Where the pager's owner lives, it is asked to yield first. It hears what became of
that: all was taken, or the successor has failed, and the owner starts another pair, as after any other death.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import time
from typing import Any, Final, NoReturn

from aiouffd.errors import UffdError
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.pager.process import control
from aiouffd.pager.process.handles import close_strays, has_ended, open_descriptors, runs_nothing
from aiouffd.pager.process.journal import Journal, Whose
from aiouffd.pager.process.replay import survey
from aiouffd.pager.process.state import LASTING, State

__all__ = ["Holder"]

log: logging.Logger = logging.getLogger("aiouffd.holder")

_LOOK: Final = 1.0  # seconds between two looks whether what is held is of use
_GLANCE: Final = 0.002  # seconds between two looks at the successor's journal
_YIELD: Final = 15.0  # seconds for the owner to have no handoff under way
_DEATH: Final = 10.0  # seconds for a process that was killed to end


class _RefusedError(Exception):
    """Nothing is given; the text says why."""


class Holder:
    """Holds, and gives.

    Args:
        journal: the pager's.
        connection: the pager's, to its owner: closed when keeper and worker have ended, since that tells the owner.
        listener: where successors ask. The owner says when.
        channel: to the owner.
        keeper: the keeper's pidfd.
    """

    def __init__(
        self, journal: Journal, connection: socket.socket, listener: socket.socket, channel: socket.socket, keeper: int
    ) -> None:
        self._journal = journal
        self._connection = connection
        self._listener = listener
        self._channel: socket.socket | None = channel
        self._keeper = keeper
        self._guest: socket.socket | None = None
        self._listens = False
        self._others: set[int] | None = open_descriptors() - {connection.fileno()}

    def run(self) -> NoReturn:
        """Hold until nothing is left, the owner has others that do, or all was taken."""
        while True:
            poller = select.poll()
            listener = self._listener if self._may_give and self._guest is None else None
            for source in (self._channel, self._guest, listener):
                if source is not None:
                    poller.register(source, select.POLLIN)
            if not has_ended(self._keeper):
                poller.register(self._keeper, select.POLLIN)
            elif not runs_nothing(self._worker):
                poller.register(self._worker, select.POLLIN)
            ready = dict(poller.poll(_LOOK * 1000))
            if self._channel is not None and self._channel.fileno() in ready:
                self._hear()
            self._look()
            if self._guest is not None and self._guest.fileno() in ready:
                self._answer(self._guest)
            elif self._listener.fileno() in ready:
                self._welcome()

    @property
    def _may_give(self) -> bool:
        """Whether successors are answered: the owner has said so, or has ended, and there is something of use."""
        if self._listens:
            return True
        return self._channel is None and not self._journal.provisional and bool(self._state().notes)

    @property
    def _worker(self) -> int:
        return self._journal.descriptor(Whose.WORKER)

    def _hear(self) -> dict[str, Any]:
        """Take a message of the owner."""
        assert self._channel is not None
        try:
            message, _ = control.receive(self._channel)
        except (control.Closed, OSError):
            self._channel.close()
            self._channel = None  # the owner has ended, without a word
            return {}
        if message["op"] == "end":
            os._exit(0)
        self._listens |= message["op"] == "listen"
        return message

    def _look(self) -> None:
        """Tell the owner that nobody serves; end where nothing is left."""
        if not (has_ended(self._keeper) and runs_nothing(self._worker)):
            return
        state = self._state()
        if self._others is not None:  # now, and once: the numbers are this process's alone from here on
            self._connection.close()
            _close_left(self._others | state.numbers | {self._worker, self._journal.descriptor(Whose.GUEST)})
            self._others = None
        kept = any(note.text.get(LASTING) for note in state.notes.values())
        if self._journal.provisional:  # it is another holder's, and stays so: who could have said otherwise has ended
            os._exit(0)
        if self._channel is None and not kept and not any(map(_lives, state.spaces.values())):
            os._exit(0)

    def _state(self) -> State:
        return survey(self._journal) or State()

    # A successor

    def _welcome(self) -> None:
        with contextlib.suppress(OSError):
            guest, _ = self._listener.accept()
            self._journal.note_descriptor(Whose.GUEST, guest.fileno())
            self._guest = guest
            if control.Sender(guest).uid not in (0, os.geteuid()):
                self._leave()

    def _leave(self) -> None:
        """Be done with whoever has asked."""
        if self._guest is not None:
            self._journal.note_descriptor(Whose.GUEST, -1)
            self._guest.close()
            self._guest = None

    def _answer(self, guest: socket.socket) -> None:
        try:
            message, fds = control.receive(guest)
            if message["op"] == "look":
                self._tell(guest)
            elif message["op"] == "take":
                theirs = Journal(fds[0])
                os.close(fds[0])
                if self._channel is not None and not message["over"]:
                    raise _RefusedError("another server serves there, and lives")  # noqa: TRY301
                self._give(guest, theirs)
        except _RefusedError as error:
            with contextlib.suppress(control.Closed, OSError):
                control.send(guest, {"refused": str(error)}, wait=False)
            self._leave()
        except (control.Closed, OSError, ValueError, LookupError, UffdError):
            self._leave()

    def _tell(self, guest: socket.socket) -> None:
        """Send what is served, and the descriptors."""
        along = sorted(self._state().numbers)
        owned = self._channel is not None
        control.send(guest, {"numbers": along, "owned": owned}, [self._journal.fd, *along])

    def _give(self, guest: socket.socket, theirs: Journal) -> None:
        """Have keeper and worker end, and give all; hold on where the successor does not come to serve.

        Whose all is, is a word in the successor's journal (`Journal.provisional`). The end of the connection tells that
        the successor has ended, and its pager, which has it as well: that word changes no more.
        """
        self._await_yield()
        self._journal.note_descriptor(Whose.SUCCESSOR, guest.fileno())  # a worker that begins just now ends
        for process in (self._keeper, self._worker):  # in this order: a keeper would make another worker
            _kill(process)
        if not runs_nothing(self._worker, _DEATH):  # until then it may be reading
            raise _RefusedError("the pager does not end: something waits for a file system that does not answer")
        poller = select.poll()
        poller.register(guest, select.POLLIN)
        try:
            self._tell(guest)
            while theirs.provisional:
                if poller.poll(_GLANCE * 1000):
                    control.receive(guest)
        finally:
            if not theirs.provisional:
                self._say("taken")
                os._exit(0)
            self._journal.note_descriptor(Whose.SUCCESSOR, -1)
            self._say("kept")
            log.error("the successor has failed, and what it was given is held on")

    def _await_yield(self) -> None:
        """Ask the owner to take no client; one that has ended is not waited for."""
        self._say("yield")
        until = time.monotonic() + _YIELD
        while self._channel is not None:
            poller = select.poll()
            poller.register(self._channel, select.POLLIN)
            if not poller.poll(max(0.0, until - time.monotonic()) * 1000):
                self._say("kept")
                raise _RefusedError(f"the server that serves there does not yield within {_YIELD:g} s")
            if self._hear().get("op") == "yielded":
                return

    def _say(self, event: str) -> None:
        if self._channel is not None:
            with contextlib.suppress(control.Closed, OSError):
                control.send(self._channel, {"event": event}, wait=False)


def _close_left(known: set[int]) -> None:
    """Close what dead processes have left in the table: who waits at the other end of a socket is told by that."""
    for fd in close_strays(known):
        with contextlib.suppress(OSError), socket.socket(fileno=fd) as left:
            if left.family != socket.AF_UNIX:  # its close(2) may wait for what was not sent
                left.detach()


def _kill(pidfd: int) -> None:
    if pidfd >= 0:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _lives(space: Any) -> bool:
    uffd = Userfaultfd.from_fd(space.fd)
    try:
        return not uffd.gone()
    finally:
        uffd.detach()
