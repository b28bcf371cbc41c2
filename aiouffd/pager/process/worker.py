"""The worker: the event loop that serves. What it must not lose is in the journal before it acts on it."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import select
import signal
import socket
from typing import TYPE_CHECKING, Any

from aiouffd.errors import NativePartError, PagerStartError, encode_error
from aiouffd.handoff.own_threads import close_foreign
from aiouffd.kernel import libc
from aiouffd.loops import new_event_loop
from aiouffd.native.reader import declared
from aiouffd.pager.process import control
from aiouffd.pager.process.answers import Answers
from aiouffd.pager.process.blocked import Blocked
from aiouffd.pager.process.handles import close_all, known_by
from aiouffd.pager.process.handover import Handover
from aiouffd.pager.process.inherited import INTERRUPT_BLOCKED_LOOP, SAY_WHAT_BLOCKS
from aiouffd.pager.process.journal import Whose
from aiouffd.pager.process.replay import replay
from aiouffd.pager.process.served import Served

if TYPE_CHECKING:
    from aiouffd.errors import UffdError
    from aiouffd.pager.process.child_descriptors import Vault
    from aiouffd.pager.process.handles import Stray
    from aiouffd.pager.process.journal import Journal
    from aiouffd.pager.process.serialization import Pickles

__all__ = ["prepare", "run"]

log: logging.Logger = logging.getLogger("aiouffd.pager")

_WRITING = 60.0  # seconds for what an application has written, which was killed
_FAREWELL = 0.5  # seconds for the last messages to be sent
_FIRST = 0.01  # seconds for sources to be opened again, before requests are read
_KEPT = 64 << 20  # bytes: the answers of the reads that are under way at once, and their parts
_MOST_ERRORS = 1000  # that are kept while nobody reads
_TOGETHER = 16  # messages that are taken in a turn of the loop
_LATER = 0.1  # seconds until descriptors that may block are closed


def prepare() -> None:
    """Do what each worker would do, before any of them is made."""
    asyncio.set_event_loop(None)  # makes the policy
    with contextlib.suppress(NativePartError):
        declared()


def run(journal: Journal, vault: Vault, connection: socket.socket, pickles: Pickles, slow: list[Stray]) -> None:
    """Serve until nobody is left to be served.

    Args:
        journal: what is served.
        vault: where descriptors of forked children are kept.
        connection: to the client.
        pickles: how often a source or handler is unpickled.
        slow: descriptors that a worker before this one has left, and that may take long to close; what they are of.
    """
    journal.workers += 1
    libc.keep_freed_memory(_KEPT)
    libc.ask_for_short_slices()  # threads wait for this process, and it seldom works for long
    gc.freeze()  # what the keeper made lives as long as the worker does
    if journal.provisional:  # until `go`: all that is opened stays, and threads wait for that
        gc.disable()
    os.register_at_fork(after_in_child=connection.close)  # a source may fork: its child would be taken for the worker
    # The loop is left as it is: to close it would be to wait for threads, and for tasks that do not let themselves be
    # canceled, and nobody is left who could wait for what they do.
    loop = new_event_loop()
    asyncio.set_event_loop(loop)
    for fd, was in slow:  # later: each starts a thread, and who waits for a page comes first
        loop.call_later(_LATER, _close_left, fd, was)
    loop.run_until_complete(_Worker(loop, journal, vault, connection, pickles).main())
    journal.done = True
    # The process that waits for the end of this one need not wait for threads that close files.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _close_left(fd: int, was: str | tuple[int, int] | None) -> None:
    if was is not None and known_by(fd) == was:  # else who had opened it has closed it, and the number is another's
        close_foreign([fd])


class _Worker:
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        journal: Journal,
        vault: Vault,
        connection: socket.socket,
        pickles: Pickles,
    ) -> None:
        self.loop = loop
        self.journal = journal
        self.connection = connection
        # libuv watches nothing any more that has had an error, as a connection whose other end was closed unread.
        self.readable = select.epoll()
        self.sender = control.Sender(connection)
        self.strangers = 0
        self.left = False  # the client has closed the connection, or has ended
        self.done = asyncio.Event()
        self.outbox = control.Outbox(connection)
        self.served = Served(
            loop,
            journal,
            vault,
            on_error=self.error,
            tell=self.send,
            on_idle=self.idle,
            on_owner_exit=self.leave,
        )
        self.handover = Handover(self.served)
        self.answers = Answers(self.served, self.handover, pickles)

    async def main(self) -> None:
        # The keeper sends these when the loop does not turn.
        blocked = Blocked(self.served)
        signal.signal(SAY_WHAT_BLOCKS, blocked.say)
        faulthandler.register(SAY_WHAT_BLOCKS, chain=True)
        signal.signal(INTERRUPT_BLOCKED_LOOP, blocked.interrupt)
        self.connection.setblocking(False)
        self.journal.begin_anew()
        await self.succeed()
        if self.served.tasks:  # who waits for a page comes first; a source that does not answer holds up nobody
            await asyncio.wait(self.served.tasks, timeout=_FIRST)
        self.readable.register(self.connection, select.EPOLLIN)
        self.loop.add_reader(self.readable.fileno(), self.receive)
        pidfd = os.dup(self.journal.descriptor(Whose.WORKER))
        # What a worker before this one was asked for, and has not answered, is asked again.
        self.send({"event": "ready", "pid": os.getpid(), "again": self.journal.workers > 1}, [pidfd])
        await self.done.wait()
        writes = any(origin.options.write_back for origin in self.served.origins.values())
        for origin in list(self.served.origins.values()):
            self.served.retire(origin)
        if self.served.tasks:
            await asyncio.wait(self.served.tasks, timeout=_WRITING if writes else _FAREWELL)

    async def succeed(self) -> None:
        """Go on where a worker before this one has died, if there was one."""
        content = self.journal.load()
        if not content.records:
            return
        end = replay(content)
        awaits = end.state.meta.awaits
        if awaits >= 0:
            with socket.socket(fileno=awaits) as predecessor:
                if not await self.handover.is_left_to_us(predecessor, end.state):
                    return
        self.served.restore(end, content.identity)
        if awaits >= 0:
            self.served.note_meta()

    # The connection

    def receive(self) -> None:
        """Take a message, and begin to do what it asks for; or several, while no fault is read that would wait."""
        for _ in range(_TOGETHER if self.journal.provisional else 1):
            if not self.take():
                return

    def take(self) -> bool:
        """Take a message, and begin to do what it asks for; tell whether there may be more."""
        try:
            message, fds = control.receive(self.connection, self.sender)
        except BlockingIOError:
            return False
        except control.StrangerError as error:
            self.strangers += 1
            if self.strangers == 1:
                log.warning("%s; more such messages are dropped without a word", error)
            return True
        except ValueError as error:
            log.error("a message of the pager's owner cannot be understood and is dropped: %s", error)  # noqa: TRY400
            return True
        except control.Closed:
            self.loop.remove_reader(self.readable.fileno())
            self.leave()
            return False
        except control.DescriptorsLostError as error:
            log.error("%s", error)  # noqa: TRY400 - no traceback helps here
            if "id" in error.message:
                self.send({"id": error.message["id"], "error": encode_error(PagerStartError(str(error)))})
            return True
        self.served.spawn(self.answer(message, fds))
        return bool(message.get("op") != "go")  # that is done first, whatever is next: the end, perhaps

    async def answer(self, message: dict[str, Any], fds: list[int]) -> None:
        """Do what a message asks for, and say so: whoever asked waits until then."""
        try:
            answer = {"ok": await self.answers.answer(message, fds)}
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever it is, it belongs to whoever asked
            answer = {"error": encode_error(error)}
        self.send({"id": message["id"], **answer})

    def error(self, token: str, error: UffdError) -> None:
        # A storm of them, while nobody reads, is told by its beginning.
        self.send({"event": "error", "token": token, "error": encode_error(error)}, most=_MOST_ERRORS)

    def send(self, message: dict[str, Any], fds: list[int] | None = None, *, most: int | None = None) -> bool:
        """Tell the client; what it does not read now is kept. The descriptors are taken; as `Outbox.put`."""
        kept = True
        try:
            kept = self.outbox.put(message, fds, most=most)
            if not kept and self.outbox.lost == 1:
                log.warning("the pager's owner reads nothing: of what is told of faults and errors, more is dropped")
        except (control.Closed, OSError) as error:
            log.debug("nobody is there to be told: %s", error)
        if self.outbox:
            self.loop.add_writer(self.connection.fileno(), self.flush)
        if fds:
            close_all(fds)
        return kept

    def flush(self) -> None:
        try:
            for _, error in self.outbox.flush():
                log.debug("the client is not told: %s", error)
        except control.Closed as error:
            log.debug("nobody is there to be told: %s", error)
        if not self.outbox:
            self.loop.remove_writer(self.connection.fileno())
            if self.outbox.lost:
                log.warning(
                    "messages of faults and errors that were dropped, since nobody read them: %d", self.outbox.lost
                )
                self.outbox.lost = 0

    # The end

    def leave(self) -> None:
        """The client is gone: end as soon as nothing is served."""
        if self.journal.provisional:  # nothing is: all is another pager's, and stays so
            self.journal.done = True
            os._exit(0)
        self.left = True
        self.idle()

    def idle(self) -> None:
        if self.left and self.served.is_empty:
            self.done.set()
