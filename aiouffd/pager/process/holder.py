"""The holder: a third process of a pager, for the case that all others are killed, its owner's included.

It is made as the worker is: it shares the keeper's table of descriptors (`cloning`), and the journal, which says what
they are. So there is no moment at which a descriptor is the worker's and not the holder's: that of a forked child is in
the holder's table when the kernel has told of the fork. It serves nothing. Where the keeper is killed, it makes the
next one, which goes on with the worker, or makes another; where the holder is killed, the keeper makes the next one.

Whoever is to serve next asks at the holder's socket. A *look* tells what is served, while it is served. To *take* it
is to end keeper and worker, which loses nothing, and to be given the journal as it is then. So an upgrade and a total
loss are the same to the successor. Where the pager's owner lives, it is asked to yield first. It hears what became of
that: all was taken, or the successor has failed, and there is another keeper.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn

from aiouffd.errors import UffdError
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.pager.process import control
from aiouffd.pager.process.deaths import CALM, Deaths
from aiouffd.pager.process.handles import (
    close_all,
    close_strays,
    code_of,
    open_descriptors,
    runs_nothing,
    send_signal,
)
from aiouffd.pager.process.journal import Claim, Whose
from aiouffd.pager.process.replay import survey
from aiouffd.pager.process.state import LASTING, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.pager.process.journal import Journal

__all__ = ["Holder"]

log: logging.Logger = logging.getLogger("aiouffd.holder")

_LOOK: Final = 1.0  # seconds between two looks whether what is held is of use
_GLANCE: Final = 0.002  # seconds between two looks at the successor's journal
_YIELD: Final = 90.0  # seconds for the owner to have no handoff under way, whose source may have to be opened
_PAUSE: Final = 0.5  # seconds until a keeper that could not be made is tried again
_EXIT: Final = 1.0  # seconds between the ends of two connections, when the process ends that has both
_DEATH: Final = 40.0  # seconds for a process that was killed to end; until then nobody else can serve
_REMINDER: Final = 10.0  # seconds between two messages about a successor that is waited for


class _RefusedError(Exception):
    """Nothing is given; the text says why."""


class Holder:
    """Holds, and gives.

    Args:
        journal: the pager's.
        connection: the pager's, to its owner: closed when keeper and worker have ended, since that tells the owner.
        listener: where successors ask. The owner says when.
        channel: to the owner.
        own: the descriptors of the pager that no worker has opened.
        make_keeper: makes a keeper; its pidfd is noted in the journal. Raises OSError.
    """

    def __init__(
        self,
        journal: Journal,
        connection: socket.socket,
        listener: socket.socket,
        channel: socket.socket,
        own: set[int],
        make_keeper: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._connection = connection
        self._listener = listener
        self._name = listener.getsockname()
        self._channel: socket.socket | None = channel
        self._make_keeper = make_keeper
        self._since = time.monotonic()  # it lives
        self._deaths = Deaths()
        self._guest: socket.socket | None = None
        self._others: set[int] | None = own - {connection.fileno()}

    def run(self) -> NoReturn:
        """Hold until nothing is left, the owner has others that do, or all was taken."""
        self._begin()
        while True:
            self._look()
            poller = select.poll()
            listener = self._listener if self._may_give and self._guest is None else None
            for source in (self._channel, self._guest, listener):
                if source is not None:
                    poller.register(source, select.POLLIN)
            if not runs_nothing(self._keeper):
                poller.register(self._keeper, select.POLLIN)
            elif not runs_nothing(self._worker):
                poller.register(self._worker, select.POLLIN)
            ready = dict(poller.poll(_LOOK * 1000))
            if self._channel is not None and self._channel.fileno() in ready:
                self._hear()
            if self._guest is not None and self._guest.fileno() in ready:
                self._answer(self._guest)
            elif self._listener.fileno() in ready:
                self._welcome()

    @property
    def _may_give(self) -> bool:
        """Whether successors are answered: the owner has said so, or has ended, and there is something of use."""
        if self._journal.listens:
            return True
        return self._channel is None and not self._journal.provisional and bool(self._state().notes)

    @property
    def _owned(self) -> bool:
        """Whether the owner lives. That it hears nothing any more does not tell: the other connection does."""
        if self._channel is not None or self._connection.fileno() < 0:
            return self._channel is not None
        poller = select.poll()
        poller.register(self._connection, 0)  # POLLHUP
        return not poller.poll(_EXIT * 1000)

    @property
    def _keeper(self) -> int:
        return self._journal.descriptor(Whose.KEEPER)

    @property
    def _worker(self) -> int:
        return self._journal.descriptor(Whose.WORKER)

    def say(self, event: str, *fds: int) -> None:
        """Tell the owner something, if it lives. The keeper says so, too, what it has made."""
        if self._channel is not None:
            with contextlib.suppress(control.Closed, OSError):
                control.send(self._channel, {"event": event}, list(fds), wait=False)

    def _hear(self) -> dict[str, Any]:
        """Take a message of the owner."""
        assert self._channel is not None
        try:
            message, _ = control.receive(self._channel)
        except (control.Closed, OSError):
            self._channel.detach()  # the number stays: the keeper may be about to say something
            self._channel = None  # the owner has ended, without a word
            return {}
        if message["op"] == "end":
            self._end()
        self._journal.listens |= message["op"] == "listen"
        return message

    def _end(self) -> NoReturn:
        """Be done: the keeper makes no other."""
        self._journal.note_descriptor(Whose.HOLDER, -1)
        os._exit(0)

    def _look(self) -> None:
        """Make another keeper, or tell the owner that nobody serves; end where nothing is left."""
        if not runs_nothing(self._keeper):
            return
        while self._channel is not None and _readable(self._channel):  # it may have said that this is the end
            self._hear()
        if not self._journal.done:
            self._replace_keeper()
            return
        if not runs_nothing(self._worker):
            return
        state = self._state()
        if self._others is not None:  # now, and once: the numbers are this process's alone from here on
            self._connection.close()
            guest = {self._guest.fileno()} if self._guest is not None else set()
            _close_left(self._others | state.numbers | self._journal.descriptors | guest)
            self._others = None
        kept = any(note.text.get(LASTING) for note in state.notes.values())
        if self._journal.provisional:  # it is another holder's, and stays so: who could have said otherwise has ended
            self._end()
        if self._channel is None and not kept and not any(map(_lives, state.spaces.values())):
            self._end()

    def _replace_keeper(self) -> None:
        """Make another keeper in place of one that was killed. Where all crash by themselves, leave it to the owner."""
        code = code_of(self._keeper)
        code = -signal.SIGKILL if code is None else code  # another holder has made it
        calm, self._since = time.monotonic() - self._since > CALM, time.monotonic()
        hopeless = self._deaths.add(code, self._journal.progress(), calm=calm) and code != -signal.SIGKILL
        if hopeless and self._channel is not None:
            log.error("%d keepers died with no fault resolved between them: the server goes on", self._deaths.count)
            self._end()
        time.sleep(self._deaths.pause)
        log.warning("the keeper died and is replaced")
        try:
            self._make_keeper()
        except OSError as error:
            log.error("no keeper can be started (%s): tried again", error.strerror)  # noqa: TRY400
            time.sleep(_PAUSE)
            return
        self.say("keeper", self._keeper)

    def _state(self) -> State:
        return survey(self._journal) or State()

    # A successor

    def _welcome(self) -> None:
        with contextlib.suppress(OSError):
            self._guest, _ = self._listener.accept()
            if control.Sender(self._guest).uid not in (0, os.geteuid()):
                self._leave()

    def is_guest(self, fd: int) -> bool:
        """Tell whether a descriptor is the connection of whoever asks here: nobody else may close it."""
        try:
            found = socket.socket(fileno=fd)
        except OSError:
            return False
        try:  # the listener has the name, too, and is in a note as well
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            return bool(self._name) and found.getsockname() == self._name and not listens
        except OSError:
            return False
        finally:
            found.detach()

    def _begin(self) -> None:
        """Hang up on whoever a holder before this one has talked to: nobody knows what they were told."""
        if self._guest is not None:  # of the holder that has made the keeper that has made this one
            self._guest.detach()
            self._guest = None
        for fd in filter(self.is_guest, open_descriptors()):
            self._guest = socket.socket(fileno=fd)
            self._leave()
            self.say("kept")

    def _leave(self) -> None:
        """Be done with whoever has asked."""
        if self._guest is not None:
            with contextlib.suppress(OSError):
                self._guest.shutdown(socket.SHUT_RDWR)  # the owner has it, too, perhaps
            self._guest.close()
            self._guest = None

    def _answer(self, guest: socket.socket) -> None:
        fds: list[int] = []
        try:
            message, fds = control.receive(guest)
            if message["op"] == "look":
                self._tell(guest)
            elif message["op"] == "take":
                if not message["over"] and self._owned:
                    raise _RefusedError("another server serves there, and lives")  # noqa: TRY301
                if not Claim(fds[0]).provisional:
                    raise _RefusedError("the successor's pager serves already")  # noqa: TRY301
                self._give(guest, fds[0])
        except _RefusedError as error:
            with contextlib.suppress(control.Closed, OSError):
                control.send(guest, {"refused": str(error)}, wait=False)
            self._leave()
        except control.Closed:
            self._leave()
        except (OSError, ValueError, LookupError, UffdError) as error:
            log.warning("a successor cannot be answered: %r", error)
            self._leave()
        finally:
            close_all(fds)

    def _tell(self, guest: socket.socket) -> None:
        """Send what is served, and the descriptors."""
        along = sorted(self._state().numbers)
        control.send(guest, {"numbers": along, "owned": self._owned}, [self._journal.fd, *along])

    def _give(self, guest: socket.socket, journal: int) -> None:
        """Have keeper and worker end, and give all; hold on where the successor does not come to serve.

        Whose all is, is a word in the successor's journal (`Journal.provisional`). The end of the connection tells that
        the successor has ended, and its pager, which has it as well: that word changes no more. The owner has both: it
        looks by itself, where this process is killed meanwhile.
        """
        theirs, poller = Claim(journal), select.poll()
        poller.register(guest, select.POLLIN)
        try:
            self._await_yield(journal, guest)
            # In this order: a keeper would make another worker. One that it has just made is in the journal, too.
            for whose in (Whose.KEEPER, Whose.WORKER):
                send_signal(self._journal.descriptor(whose), signal.SIGKILL)
                if not runs_nothing(self._journal.descriptor(whose), _DEATH):  # until then it may be reading
                    raise _RefusedError("the pager does not end: a file system that it waits for does not answer")
            self._tell(guest)
            since = told = time.monotonic()
            while theirs.provisional:
                if poller.poll(_GLANCE * 1000):
                    control.receive(guest)
                if (now := time.monotonic()) - told > _REMINDER:
                    told = now
                    log.warning("a successor was given all %.0f s ago, and does not serve yet: pages wait", now - since)
        finally:
            if not theirs.provisional:
                self.say("taken")
                self._end()
            self._journal.done = self._others is None  # else whoever has ended was killed
            self.say("kept")
            log.error("the successor has failed, and what it was given is held on")

    def _await_yield(self, theirs: int, guest: socket.socket) -> None:
        """Ask the owner to take no client; one that has ended is not waited for, and for a successor that has neither.

        What the owner says to an earlier successor, that has ended meanwhile, is no answer.

        Raises:
            control.Closed: it has ended: nobody is killed for it.
        """
        number = time.monotonic_ns()
        self.say(f"yield {number}", theirs, guest.fileno())
        until = time.monotonic() + _YIELD
        while self._channel is not None:
            poller = select.poll()
            poller.register(self._channel, select.POLLIN)
            poller.register(guest, select.POLLIN)
            ready = dict(poller.poll(max(0.0, until - time.monotonic()) * 1000))
            if not ready:
                raise _RefusedError(f"the server that serves there does not yield within {_YIELD:g} s")
            if guest.fileno() in ready:
                close_all(control.receive(guest)[1])
            if self._channel.fileno() not in ready:
                continue
            op = self._hear().get("op")
            if op == f"yielded {number}":
                return
            if op == "refuse":
                raise _RefusedError("the server that serves there has too many files open (RLIMIT_NOFILE) to yield")
        if self._owned:
            raise _RefusedError("the server that serves there lives, and hears nothing of its holder")


def _close_left(known: set[int]) -> None:
    """Close what dead processes have left in the table: who waits at the other end of a socket is told by that."""
    for fd, _ in close_strays(known):
        with contextlib.suppress(OSError), socket.socket(fileno=fd) as left:
            if left.family != socket.AF_UNIX:  # its close(2) may wait for what was not sent
                left.detach()


def _readable(source: socket.socket, seconds: float = 0.0) -> bool:
    poller = select.poll()
    poller.register(source, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def _lives(space: Any) -> bool:
    uffd = Userfaultfd.from_fd(space.fd)
    try:
        return not uffd.gone()
    finally:
        uffd.detach()
