"""The keeper: forks the worker, and forks it again when it dies. It does nothing else, so that nothing can kill it.

It imports what the worker needs, so that a fork is ready in some milliseconds, and starts no thread but the one that
writes its log, so that it can fork at all. The worker shares the keeper's table of descriptors (`cloning`).

Where there is a holder, each of the two makes the other anew: the holder has a copy of all that the keeper has. So as
long as one of them lives, journal and table stay what they are, whichever processes are killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import time
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from aiouffd.engine.statistics import Counter
from aiouffd.errors import PagerDiedError, encode_error
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.limits import limit_error
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.pager.process import control, worker
from aiouffd.pager.process.cloning import clone
from aiouffd.pager.process.deaths import CALM, Deaths
from aiouffd.pager.process.handles import (
    close_all,
    close_strays,
    code_of,
    explained,
    grow_table,
    has_ended,
    is_open,
    is_pidfd,
    open_descriptors,
    open_pidfd,
    pid_of,
    runs_nothing,
    send_signal,
    state_of,
)
from aiouffd.pager.process.holder import Holder
from aiouffd.pager.process.inherited import INTERRUPT_BLOCKED_LOOP, SAY_WHAT_BLOCKS, called
from aiouffd.pager.process.journal import Whose
from aiouffd.pager.process.last_resort import Forsaken, LastResort, on_error_of
from aiouffd.pager.process.replay import last_meta, survey
from aiouffd.pager.process.serialization import config_of, modules, words_of
from aiouffd.pager.process.state import State

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from aiouffd.pager.process.child_descriptors import Vault
    from aiouffd.pager.process.handles import Stray
    from aiouffd.pager.process.journal import Journal
    from aiouffd.pager.process.serialization import Pickles

__all__ = ["import_for", "run"]

log: logging.Logger = logging.getLogger("aiouffd.keeper")

BLOCKED = 3.0
"""Seconds without a turn of the worker's loop, until that is reported."""
HOPELESS = 20.0
"""Seconds without a turn of the worker's loop, until what blocks it is interrupted."""
GRACE = 3.0
"""Seconds more, until the worker is killed, and so replaced."""
ORPHANED = 1.0
"""Seconds without a turn until the worker is killed, where who started the pager is gone, and all that it serves."""

_TICK = 1.0
_CLONE_PAUSE = 0.5
_KEEPER, _HOLDER, _WORKER = "aiouffd-keeper", "aiouffd-holder", "aiouffd-worker"
_LOOK = 0.5  # seconds between looks whether the processes are still there


def run(
    journal: Journal,
    vault: Vault,
    connection: socket.socket,
    pickles: Pickles,
    hold: tuple[socket.socket, socket.socket] | None = None,
) -> int:
    """Keep a worker alive until it has nothing left to serve; return the exit status.

    Args:
        journal: what is served.
        vault: for the descriptors of forked children.
        connection: to the client.
        pickles: how often a worker unpickles.
        hold: where successors ask the holder, and its channel to the client; None: there is no holder.
    """
    called(_KEEPER)
    worker.prepare()
    grow_table()
    keeper = _Keeper(journal, vault, connection, pickles)
    if hold is not None:
        try:
            keeper.hold(*hold)
        except OSError as error:
            return _refuse("holder", connection, error)
    return keeper.run()


class _Keeper:
    """What a keeper has, and the next one, which the holder makes of its own copy: all share one table of descriptors.

    Attributes:
        holder: what is run where there is to be one.
    """

    def __init__(self, journal: Journal, vault: Vault, connection: socket.socket, pickles: Pickles) -> None:
        self._journal = journal
        self._vault = vault
        self._connection = connection
        self._pickles = pickles
        # The list has its own number, which a worker's may get.
        self._own = {fd for fd in open_descriptors() if is_open(fd)}
        self.holder: Holder | None = None

    def hold(self, listener: socket.socket, channel: socket.socket) -> None:
        """Have a holder, which has the table of descriptors for as long as anybody needs it."""
        self._journal.note_descriptor(Whose.KEEPER, open_pidfd(os.getpid()))
        self.holder = Holder(self._journal, self._connection, listener, channel, self._own, self._make_keeper)
        self._make_holder()

    def _make(self, whose: Whose, be: Callable[[], NoReturn]) -> None:
        """Make a process that shares the table. There is no moment at which its pidfd is not noted.

        Raises:
            OSError: there is none.
        """
        before = self._journal.descriptor(whose)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = clone(self._journal.place(whose))
        except OSError:
            self._journal.note_descriptor(whose, before)
            raise
        if pid == 0:
            be()

    def _make_keeper(self) -> None:
        """Be called by the holder, where the keeper was killed."""
        self._make(Whose.KEEPER, partial(self._be_keeper, self._journal.descriptor(Whose.KEEPER)))

    def _be_keeper(self, before: int) -> NoReturn:
        called(_KEEPER)
        try:
            # Only keepers close what others have left, which this number is now: the holder would close it twice.
            if before >= 0:
                os.close(before)
            self.run()
        except BaseException:
            log.exception("the keeper failed")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def _make_holder(self) -> None:
        assert self.holder is not None
        before = self._journal.descriptor(Whose.HOLDER)
        self._make(Whose.HOLDER, self._be_holder)
        if before >= 0:
            os.close(before)
        # Before the first worker is made: the connection does not tell of the others' deaths as long as that lives.
        self.holder.say("holder", self._journal.descriptor(Whose.HOLDER))

    def _be_holder(self) -> NoReturn:
        assert self.holder is not None
        called(_HOLDER)
        try:
            self.holder.run()
        except BaseException:
            log.exception("the holder failed")
        finally:
            os._exit(1)

    def _replace_holder(self) -> None:
        """Make the holder anew, which was killed."""
        code = code_of(self._journal.descriptor(Whose.HOLDER))
        log.warning("the holder died and is replaced")
        try:
            if code not in (None, -signal.SIGKILL):  # None: another keeper has made it
                time.sleep(_CLONE_PAUSE)
            self._make_holder()
        except OSError as error:
            log.error("no holder can be started (%s): tried again", error.strerror)  # noqa: TRY400 - no traceback helps
            time.sleep(_CLONE_PAUSE)

    def run(self) -> int:
        """Keep a worker alive; return the exit status."""
        status = self._keep()
        self._journal.done = True
        return status

    def _keep(self) -> int:
        journal, deaths, died = self._journal, Deaths(), ""
        while True:
            if not self._has_worker():
                try:
                    self._make_worker()
                except OSError as error:
                    if not _has_served(journal):
                        return _refuse("worker", self._connection, error)
                    # To give up would be to close the descriptors of forked children, who would read zeros then.
                    log.error("no worker can be started (%s): tried again", error.strerror)  # noqa: TRY400
                    if not _anybody(journal) and _hung_up(self._connection):
                        return 1
                    time.sleep(_CLONE_PAUSE)
                    continue
                if died:
                    log.warning("%s and is replaced", died)
            began, faults = time.monotonic(), journal.total(Counter.FAULTS)
            pidfd = journal.descriptor(Whose.WORKER)
            pid = pid_of(pidfd)
            code = self._wait(pidfd)
            self._forget_worker()
            if code == 0:
                return 0
            calm = journal.total(Counter.FAULTS) == faults and time.monotonic() - began > CALM
            reason = f"signal {_name(-code)}" if code < 0 else f"exit status {code}"
            died = f"the worker (pid {pid}) died ({reason})"
            journal.counters.words[Counter.RESTARTS] += 1
            if deaths.add(code, journal.progress(), calm=calm):
                log.warning(died)
                return _give_up(journal, self._connection, deaths.count, reason)
            time.sleep(deaths.pause)

    def _has_worker(self) -> bool:
        """Tell whether a worker lives that a keeper before this one has made."""
        pidfd = self._journal.descriptor(Whose.WORKER)
        # The clone has failed, in a keeper that was killed right then: the number may be this keeper's now.
        if pidfd < 0 or pidfd == self._journal.descriptor(Whose.KEEPER) or not is_pidfd(pidfd):
            self._journal.note_descriptor(Whose.WORKER, -1)
            return False
        if not runs_nothing(pidfd):
            return True
        self._forget_worker()
        if not self._journal.done:
            self._journal.counters.words[Counter.RESTARTS] += 1
        return False

    def _forget_worker(self) -> None:
        pidfd = self._journal.descriptor(Whose.WORKER)
        self._journal.note_descriptor(Whose.WORKER, -1)
        os.close(pidfd)

    def _make_worker(self) -> None:
        state = survey(self._journal) or State()
        slow = close_strays(self._own | state.numbers | self._journal.descriptors)
        if self.holder is not None:
            slow = [(fd, was) for fd, was in slow if not self.holder.is_guest(fd)]
        import_for(state)
        self._make(Whose.WORKER, partial(self._work, slow))

    def _work(self, slow: list[Stray]) -> NoReturn:
        """Be the worker. Never returns into the keeper's frames; nothing is finalized: descriptors are shared."""
        status = 1
        called(_WORKER)
        try:
            worker.run(self._journal, self._vault, self._connection, self._pickles, slow)
            status = 0
        except BaseException as error:
            log.exception("the worker failed")
            reason = limit_error("the pager's worker", getattr(error, "errno", None) or 0) or error
            with contextlib.suppress(Exception):
                control.send(self._connection, {"event": "failing", "error": encode_error(reason)}, wait=False)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _wait(self, pidfd: int) -> int:
        """Wait for the worker's end; return its code. One whose loop does not turn is told to say where, and killed.

        What counts is the time that the keeper itself has seen pass: when both were stopped (SIGSTOP, a frozen cgroup,
        a machine that was suspended) the worker has missed nothing.
        """
        words = self._journal.counters.words
        beat, still, warned, interrupted = -1, 0.0, False, False
        last = time.monotonic()
        while not self._ends(pidfd):
            now = time.monotonic()
            passed, last = min(now - last, 2 * _TICK), now
            if words[Counter.HEARTBEAT] != beat:
                beat, still, warned, interrupted = words[Counter.HEARTBEAT], 0.0, False, False
                continue
            still += passed
            state = state_of(pidfd)
            if state == "t":  # a debugger has it
                continue
            if state == "Z":
                break
            if still > BLOCKED and not warned:
                warned = True
                _say_blocked(pidfd, still, state)
            elif still > HOPELESS and not interrupted:
                interrupted = True
                send_signal(pidfd, INTERRUPT_BLOCKED_LOOP)
            elif still > HOPELESS + GRACE or (still > ORPHANED and _orphaned(self._journal)):
                log.error("the worker's event loop has not turned for %.0f s: the worker is killed", still)
                send_signal(pidfd, signal.SIGKILL)
        code = code_of(pidfd)
        if code is not None:
            return code
        # Another keeper has made it. Or threads of it wait for a file system, whatever kills them; no code of it runs.
        return 0 if self._journal.done else -signal.SIGKILL

    def _ends(self, pidfd: int) -> bool:
        """Wait for a moment, or the worker's end; tell whether it has ended. A holder that has is made anew."""
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        holder = self._journal.descriptor(Whose.HOLDER)
        if holder >= 0:
            poller.register(holder, select.POLLIN)
        ready = dict(poller.poll(_TICK * 1000))
        if holder in ready and holder == self._journal.descriptor(Whose.HOLDER):  # else it has said that it ends
            self._replace_holder()
        return pidfd in ready


def import_for(state: State) -> None:
    """Import what each worker imports that opens a source again; it says so itself where that fails."""
    for origin in state.origins.values():
        with contextlib.suppress(Exception):
            for name in modules(config_of(origin)):
                import_module(name)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)


def _say_blocked(pidfd: int, still: float, state: str) -> None:
    if state == "T":
        pid = pid_of(pidfd)
        log.error("the worker (pid %d) has been stopped for %.0f s (SIGSTOP), and pages wait for it", pid, still)
        return
    log.error(
        "the worker's event loop has not turned for %.0f s: something blocks it, a handler or a source that"
        " waits without await. Where it is:",
        still,
    )
    send_signal(pidfd, SAY_WHAT_BLOCKS)


def _orphaned(journal: Journal) -> bool:
    """Tell whether the process that has started the pager is gone, and nobody is left who could wait for a page.

    Where somebody is, a worker that does not turn has much to do, perhaps: on a busy machine one that begins with many
    clients of a server that was killed takes seconds. If each was killed before it turns, the pager would be given up.
    """
    meta = last_meta(journal.load().records)
    return meta is not None and meta.owner >= 0 and has_ended(meta.owner) and not _anybody(journal)


def _forsaken(journal: Journal) -> list[Forsaken]:
    state = survey(journal)
    if state is None:
        return []
    return [
        Forsaken(
            Userfaultfd.from_fd(space.fd, Feature(space.features)),
            space.page_size,
            [(mapping.start, mapping.end) for mapping in space.mappings],
            space.token,
            is_child=space.is_child,
            words=words_of(state.origins[space.origin], state.origins[space.origin]["fds"]),
            on_error=on_error_of(state.origins[space.origin]),
        )
        for space in state.spaces.values()
    ]


def _has_served(journal: Journal) -> bool:
    """Tell whether anything has been served: then descriptors of forked children may be here."""
    return bool(journal.load().records)


def _refuse(what: str, connection: socket.socket, error: OSError) -> int:
    """Say why there is none, and end."""
    reason = explained(f"no {what} could be started", error)
    with contextlib.suppress(control.Closed, OSError):
        control.send(connection, {"event": "died", "error": encode_error(reason)}, wait=False)
    return 1


def _anybody(journal: Journal) -> bool:
    """Tell whether any process that is served lives."""
    state = survey(journal)
    if state is None:
        return False
    uffds = [Userfaultfd.from_fd(space.fd) for space in state.spaces.values()]
    try:
        return any(not uffd.gone() for uffd in uffds)
    finally:
        for uffd in uffds:
            uffd.detach()


def _give_up(journal: Journal, connection: socket.socket, deaths: int, reason: str) -> int:
    """Say so, and poison whatever is asked for from now on, until nobody is left: no hang, no zeros."""
    error = PagerDiedError(f"{deaths} workers died with no fault resolved between them, the last by {reason}")
    connection.setblocking(False)
    outbox = control.Outbox(connection)
    _tell(outbox, {"event": "died", "error": encode_error(error)})
    resort = LastResort(_forsaken(journal))
    log.error("%s; %s", error, resort.outlook)
    client = [connection]
    looked = time.monotonic()
    while resort.spaces:
        resort.wait(1 if resort.pending else _LOOK * 1000, *client)
        resort.attend()
        if not _answer(connection, outbox, resort, error):
            client.clear()
        if outbox:
            with contextlib.suppress(control.Closed, OSError):
                outbox.flush()
        if time.monotonic() - looked > _LOOK:
            looked = time.monotonic()
            resort.look()
    return 1


def _answer(connection: socket.socket, outbox: control.Outbox, resort: LastResort, error: PagerDiedError) -> bool:
    """Answer what the client asks, that nothing of its waits; tell whether it is still there."""
    while True:
        try:
            message, fds = control.receive(connection, control.Sender(connection))
        except BlockingIOError:
            return True
        except (control.DescriptorsLostError, control.StrangerError, ValueError):
            continue
        except (control.Closed, OSError):
            return False
        close_all(fds)
        if message["op"] == "close":
            resort.forget(message["token"])
            _tell(outbox, {"id": message["id"], "ok": None})
        else:
            _tell(outbox, {"id": message["id"], "error": encode_error(error)})


def _tell(outbox: control.Outbox, message: dict[str, Any]) -> None:
    try:
        outbox.put(message)
    except (control.Closed, OSError):
        log.debug("nobody is there to be told")


def _hung_up(connection: socket.socket) -> bool:
    poller = select.poll()
    poller.register(connection, 0)
    return bool(poller.poll(0))
