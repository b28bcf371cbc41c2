"""What another server's pager has served, as its holder gives it to this process."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING, Any, Self

from aiouffd.errors import PagerStartError
from aiouffd.kernel.sockets import connect_within
from aiouffd.pager.process import control
from aiouffd.pager.process.journal import Journal
from aiouffd.pager.process.replay import survey
from aiouffd.pager.process.state import State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiouffd.pager.client.fd_store import FdStore

__all__ = ["Estate", "HolderLostError", "Predecessor"]

_TIMEOUT = 60.0  # seconds to be told what there is
_TAKING = 180.0  # seconds to be given it: longer than the holder waits for its owner, and for the ends of processes


class HolderLostError(PagerStartError):
    """The holder has ended before it has answered. Nothing was given: another may be asked."""


class Estate:
    """What is left to this process.

    Args:
        journal: descriptor of the pager's journal.
        number_of: the descriptors of this process, by the numbers that the journal has for them. They are this
            object's, but for those that others take.
        owned: a server that lives serves from it.

    Raises:
        PagerStartError: the journal is of a later version than this aiouffd.

    Attributes:
        state: what the journal amounts to, with this process's numbers.
        journal: for its counters.
    """

    def __init__(self, journal: int, number_of: Mapping[int, int], *, owned: bool = False) -> None:
        self.owned = owned
        self._fds = {journal, *number_of.values()}
        try:
            self.journal: Journal = Journal(journal)
            self.state: State = survey(self.journal) or State()
            self.state.renumber(number_of)
        except BaseException:
            self.close()
            raise

    @classmethod
    def stored(cls, store: FdStore) -> Self | None:
        """Return what systemd has passed to this start; None: nothing was served before. Raises as the class."""
        journal = store.take_journal()
        if journal is None:
            return None
        try:
            state = survey(Journal(journal)) or State()
        except PagerStartError:
            os.close(journal)
            raise
        return cls(journal, store.numbers(state))

    def take(self, fd: int) -> int:
        """Return a descriptor, which is the caller's from now on."""
        self._fds.discard(fd)
        return fd

    def close(self) -> None:
        """Close what nobody has taken."""
        while self._fds:
            os.close(self._fds.pop())


class Predecessor:
    """The holder of the server before this one.

    Args:
        connection: to it; this object's from now on.

    Attributes:
        connection: the same.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection: socket.socket = connection

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Self | None:
        """Return the one that answers at a path; None: nobody does.

        Raises:
            OSError: it cannot be reached.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connect_within(connection, path, _TIMEOUT)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except OSError as error:
            connection.close()
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        return cls(connection)

    def look(self) -> Estate:
        """Return what there is; it is served by others meanwhile. Raises as `take`."""
        return self._ask({"op": "look"}, _TIMEOUT)

    def take(self, *, over: bool, journal: int) -> Estate:
        """Have all end that serve, and return what they have left: no page is brought until it is served here.

        Args:
            over: also from a server that lives. It goes on, if this process ends before its pager was told to go.
            journal: of that pager, whose `provisional` tells.

        Raises:
            HolderLostError: the holder has ended.
            PagerStartError: it is refused, or cannot be read.
            OSError: EADDRINUSE: a server lives, and is not to be taken over from.
        """
        return self._ask({"op": "take", "over": over}, _TAKING, [journal])

    def serving(self) -> None:
        """Have the predecessor look at once whether all is served here: it ends for good then."""
        with contextlib.suppress(control.Closed, OSError):  # it has looked by itself
            control.send(self.connection, {"op": "serving"})

    def close(self) -> None:
        """Hang up."""
        self.connection.close()

    def _ask(self, question: dict[str, Any], patience: float, along: list[int] | None = None) -> Estate:
        self.connection.settimeout(patience)
        try:
            control.send(self.connection, question, along)
            message, fds = control.receive(self.connection)
        except (control.Closed, ConnectionError) as error:
            raise HolderLostError("the holder of the server before this one has ended, and all of it") from error
        except (OSError, ValueError) as error:
            raise PagerStartError(f"the server before this one does not answer: {error!r}") from error
        if "refused" in message:
            raise OSError(errno.EADDRINUSE, message["refused"])
        return Estate(fds[0], dict(zip(message["numbers"], fds[1:], strict=True)), owned=message["owned"])
