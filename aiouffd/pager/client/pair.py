"""One pager, as the process sees it that has started it: a keeper and its worker, the connection, the journal."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

from aiouffd.errors import PagerStartError, decode_error
from aiouffd.kernel.limits import limit_error
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.lifetime import close_in_children
from aiouffd.pager.client.launch import START_TIMEOUT, Launched
from aiouffd.pager.process import control
from aiouffd.pager.process.child_descriptors import Vault
from aiouffd.pager.process.handles import open_pidfd, pid_of, send_signal
from aiouffd.pager.process.journal import Journal

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence
    from typing import Self

    from aiouffd.kernel.owned_descriptor import OwnedSocket
    from aiouffd.pager.client.waiting import Waiter
    from aiouffd.pager.process.serialization import Pickles

__all__ = ["Pair"]

log: logging.Logger = logging.getLogger("aiouffd")

_LEAVE_TIMEOUT = 200  # milliseconds
_END_TIMEOUT = 5.0
_REAP_TIMEOUT = 500  # milliseconds for a keeper to end behind its worker


class Pair:
    """A keeper and its worker. The worker serves on when the keeper has died: it is an orphan then.

    Args:
        keeper: the process.
        connection: to the pager; this object's from now on.
        journal: the pager's.
        vault: the pager's; this object's from now on.
        channel: to the pager's holder; this object's from now on. None: there is no holder.

    Attributes:
        keeper_pid: that of the keeper, which a holder has made anew, perhaps.
        keeper_fd: its pidfd. The worker holds the socket too, so only this tells of the keeper's death.
        holder_fd: the holder's; closed: there is none.
        outbox: sends on the connection.
        worker_pid: 0 until the worker has said it.
        worker_fd: the worker's pidfd; closed until then. A pid might be another process's by the time that it is used.
    """

    def __init__(
        self,
        keeper: subprocess.Popen[bytes],
        connection: OwnedSocket,
        journal: Journal,
        vault: Vault,
        channel: OwnedSocket | None = None,
    ) -> None:
        self.keeper = keeper
        self.keeper_pid: int = keeper.pid
        self.holder_fd: OwnedDescriptor = OwnedDescriptor()
        self.keeper_fd: OwnedDescriptor = OwnedDescriptor(open_pidfd(keeper.pid))
        self.connection = connection
        self.outbox: control.Outbox = control.Outbox(connection)
        self.journal = journal
        self.vault = vault
        self.channel = channel
        self.worker_pid: int = 0
        self.worker_fd: OwnedDescriptor = OwnedDescriptor()

    @classmethod
    def start(
        cls,
        waiter: Waiter,
        pickles: Pickles,
        launched: Launched | None = None,
        *,
        sockets: Callable[[], Sequence[socket.socket | None]] = lambda: (),
        began: Callable[[int], None] = lambda _: None,
    ) -> Self:
        """Start a keeper and wait for its hello. Blocks for about a tenth of a second.

        Args:
            waiter: of the client, which may be stopped meanwhile.
            pickles: as for `Launched`.
            launched: the keeper, where it was started before; the pair's from now on.
            sockets: returns the listener of the holder and the lifeline, as for `Launched`.
            began: called with the descriptor of the pager's journal, which is closed then.

        Raises:
            PagerStartError: it did not start.
            StoppedError: the client is being stopped.
        """
        launched = launched or Launched(pickles, *sockets())
        try:
            found = _hello(launched.connection, waiter, began)
            return cls(launched.keeper, launched.connection, *found, launched.channel)
        except BaseException as error:
            status = launched.abandon()
            limit = limit_error("the pager's journal", getattr(error, "errno", None) or 0)
            if limit is not None:  # of this process: the pager lived until now
                raise PagerStartError(str(limit)) from error
            if isinstance(error, control.Closed | OSError | ValueError):
                raise PagerStartError(
                    f"`{' '.join(launched.arguments)}` ended with status {status} before it said hello;"
                    " its standard error tells why (is aiouffd installed for this interpreter?)"
                ) from error
            raise

    def runs(self, pid: int, pidfd: int) -> None:
        """Note which worker serves now; the pidfd is this object's from now on."""
        self.worker_fd.close()
        self.worker_pid = pid
        self.worker_fd = OwnedDescriptor(pidfd)

    @property
    def descriptors(self) -> tuple[OwnedDescriptor | OwnedSocket, ...]:
        """What this process has open for the pair."""
        return (self.connection, self.vault.outer, self.keeper_fd, self.worker_fd, self.holder_fd)

    @property
    def guard(self) -> OwnedDescriptor | None:
        """The pidfd of the keeper, or of the holder, which makes another keeper; None: both have ended."""
        guards = (self.keeper_fd, self.holder_fd)
        return next((each for each in guards if each.intact and not _readable(each, 0)), None)

    @property
    def worker_lives(self) -> bool:
        """Whether a worker runs, or its keeper: nobody else holds the other end of the connection.

        It need not have said that it is ready: its keeper may have died right before.
        """
        poller = select.poll()
        poller.register(self.connection, 0)  # POLLHUP
        return self.connection.intact and not poller.poll(0)

    def kill_worker(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the worker a signal, if it runs."""
        _signal(self.worker_fd, number)

    def hang_up(self) -> None:
        """Have a worker whose keeper has ended end, too, where it serves nothing of its own yet."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.kill_worker()

    def resume(self) -> None:
        """Have the processes go on, if they were stopped (SIGSTOP)."""
        for process in (self.worker_fd, self.keeper_fd, self.holder_fd):
            _signal(process, signal.SIGCONT)

    def tell_holder(self, op: str) -> None:
        """Send the holder a message, if there is one."""
        if self.channel is not None:
            with contextlib.suppress(control.Closed, OSError):
                control.send(self.channel, {"op": op}, wait=False)

    def hear_holder(self) -> tuple[str, list[OwnedDescriptor]]:
        """Return what the holder says, and what comes along; "lost": it has ended, or says what nobody understands.

        Nothing comes along where this process has too many files open.
        """
        assert self.channel is not None
        try:
            message, fds = control.receive(self.channel)
        except control.DescriptorsLostError as error:
            message, fds = error.message, []
        except (control.Closed, OSError, ValueError):
            return "lost", []
        event, along = str(message.get("event")), [OwnedDescriptor(fd) for fd in fds]
        if event == "keeper" and along:
            self.keeper_fd, self.keeper_pid = along[0], pid_of(along[0].fileno())
            self.keeper.poll()  # leave no zombie
        elif event == "holder" and along:
            self.holder_fd = along[0]
        return event, along

    def close_channel(self) -> None:
        """Hear no holder any more: it has ended, and keeper and worker, too."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def end(self, *, leave: bool, silent: bool = False, wait: bool = True) -> None:
        """Close the connection and wait for the processes to end; kill them where something blocks them.

        Args:
            leave: they serve on until all memory is gone. They are not waited for, and not killed. So it is, too, where
                this process has closed its descriptors of them.
            silent: the worker does not answer. It is killed at once; its successor finds that nothing is left to serve.
            wait: else return when they have let go of all that they held, and are about to end.
        """
        patience = _LEAVE_TIMEOUT if wait else 0
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        if leave or any(item.lost for item in self.descriptors):
            self._reap(patience)
        else:
            if silent:
                log.error(
                    "the pager's worker (pid %d) does not answer, and is killed: a handler or a source blocks its event"
                    " loop, or it was stopped (SIGSTOP)",
                    self.worker_pid,
                )
                self.kill_worker()
            self.resume()  # what was stopped cannot end
            if not self._await_end(_END_TIMEOUT) or wait:
                # The keeper reaps its worker. Killed before, it would leave a zombie to init, or to this process.
                _readable(self.keeper_fd, _REAP_TIMEOUT)
                self.tell_holder("end")  # else it would make another keeper
                _signal(self.keeper_fd, signal.SIGKILL)
                # A worker whose keeper was killed, here or before, does not know that it is to end.
                if self.worker_fd.intact and not _readable(self.worker_fd, 1000):
                    self.kill_worker()
            self._reap(patience)
        self.close(leave=leave)

    def _await_end(self, seconds: float) -> bool:
        """Wait until the keeper has ended, or is about to: it closes the connection then. Tell whether it is so."""
        poller = select.poll()
        poller.register(self.connection, select.POLLIN)
        poller.register(self.keeper_fd, select.POLLIN)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            ready = dict(poller.poll(left * 1000))
            if self.keeper_fd.fileno() in ready:
                return True
            try:
                for fd in control.receive(self.connection)[1] if ready else ():
                    os.close(fd)
            except (control.Closed, OSError):
                return True
        return False

    def _reap(self, milliseconds: int) -> None:
        """Wait for the keeper's end; where that takes longer, have a thread do so: no zombie may be left.

        A process may not be able to end: closing a file can wait for its file system, whatever kills the process.
        """
        # Popen.wait with a timeout sleeps for up to 50 ms between two looks.
        if _readable(self.keeper_fd, milliseconds):
            self.keeper.wait()
        else:
            threading.Thread(target=self.keeper.wait, name="aiouffd-reaper", daemon=True).start()

    def close(self, *, leave: bool = False) -> None:
        """Close the descriptors, and have the holder end; `leave`: it holds on."""
        if not leave:
            self.tell_holder("end")
        self.close_channel()
        self.connection.close()
        self.vault.close()
        self.worker_fd.close()
        self.keeper_fd.close()
        self.holder_fd.close()


def _hello(connection: socket.socket, waiter: Waiter, began: Callable[[int], None]) -> tuple[Journal, Vault]:
    if not waiter.wait(START_TIMEOUT, connection.fileno()):
        raise TimeoutError("no hello")
    message, fds = control.receive(connection)
    if message.get("event") == "failed":
        error = decode_error(message["error"])
        raise error if isinstance(error, PagerStartError) else PagerStartError(f"the pager could not start: {error}")
    journal, vault = fds
    vaulted = Vault(vault)
    close_in_children(vaulted.outer)
    try:
        began(journal)
        return Journal(journal), vaulted
    finally:
        os.close(journal)


def _signal(process: OwnedDescriptor, number: signal.Signals) -> None:
    # PermissionError: this process has dropped its privileges. Without it, the pager ends with the connection.
    with contextlib.suppress(PermissionError):
        send_signal(process.fileno() if process.intact else -1, number)


def _readable(fd: OwnedDescriptor, milliseconds: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return fd.intact and bool(poller.poll(milliseconds))
