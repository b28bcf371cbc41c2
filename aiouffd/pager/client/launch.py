"""Starts a pager's process. That takes a tenth of a second: what talks to it is imported meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
from typing import TYPE_CHECKING

from aiouffd.kernel.owned_descriptor import OwnedSocket
from aiouffd.lifetime import close_in_children
from aiouffd.pager.client.interpreter import command
from aiouffd.pager.process.handles import explained
from aiouffd.pager.process.inherited import signals_blocked

if TYPE_CHECKING:
    from aiouffd.pager.process.serialization import Pickles

__all__ = ["START_TIMEOUT", "Launched"]

START_TIMEOUT = 60.0
"""Seconds until a pager must have said hello, or answered the first request."""


class Launched:
    """A keeper that has not said hello yet.

    Args:
        pickles: what the pager unpickles; said on its command line, which nothing that is sent can change.
        listener: where successors of this process ask the pager's holder; None: there is none.
        lifeline: a connection to the holder before it, whose all is until the pager is told to go; None: there is none.

    Attributes:
        arguments: its command line, as far as people need to know it.
        keeper: the process.
        connection: our end.
        channel: our end of that to the holder, if there is one.

    Raises:
        PagerStartError: it could not be started.
    """

    def __init__(
        self, pickles: Pickles, listener: socket.socket | None = None, lifeline: socket.socket | None = None
    ) -> None:
        self.arguments: list[str] = [*command(), "-m", "aiouffd.pager"]
        self.keeper: subprocess.Popen[bytes]
        self.connection: OwnedSocket
        self.channel: OwnedSocket | None
        try:
            self.keeper, self.connection, self.channel = _launch(self.arguments, pickles, listener, lifeline)
        except OSError as error:
            raise explained(f"{self.arguments[0]!r} could not be started", error) from error

    def abandon(self) -> int:
        """End the process; return its status."""
        self.connection.close()
        if self.channel is not None:
            self.channel.close()
        self.keeper.kill()
        return self.keeper.wait()


def _launch(
    arguments: list[str], pickles: Pickles, listener: socket.socket | None, lifeline: socket.socket | None
) -> tuple[subprocess.Popen[bytes], OwnedSocket, OwnedSocket | None]:
    """Start the process; return it, and our ends of the connection and of the holder's channel."""
    with contextlib.ExitStack() as stack:
        ours, inherited = OwnedSocket.pair(socket.SOCK_SEQPACKET)
        stack.callback(inherited.close)
        close_in_children(ours)
        channel, further = None, []
        if listener is not None:
            channel, its = map(close_in_children, OwnedSocket.pair(socket.SOCK_SEQPACKET))
            stack.callback(its.close)
            further = [
                fcntl.fcntl(item.fileno(), fcntl.F_DUPFD_CLOEXEC, 3) for item in (listener, its, lifeline) if item
            ]
            for fd in further:
                stack.callback(os.close, fd)
        inherited.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # the pager checks who has sent each message
        # Where this process has closed standard descriptors, the socket may have the number of one.
        theirs = fcntl.fcntl(inherited.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        stack.callback(os.close, theirs)
        on_error = stack.enter_context(contextlib.ExitStack())
        on_error.callback(ours.close)
        if channel is not None:
            on_error.callback(channel.close)
        # A session of its own: Ctrl-C is not for the pager.
        with signals_blocked():
            keeper = subprocess.Popen(  # noqa: S603
                [*arguments, str(theirs), pickles, *map(str, further)],
                pass_fds=[theirs, *further],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        on_error.pop_all()
    return keeper, ours, channel
