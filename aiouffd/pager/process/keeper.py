"""The keeper: forks the worker, and forks it again when it dies. It does nothing else, so that nothing can kill it.

It imports what the worker needs, so that a fork is ready in some milliseconds, and starts no thread, so that it can
fork at all. The worker is made with clone(CLONE_FILES): it shares the keeper's table of descriptors. The descriptor
of a forked child of the application arrives in the table of whoever reads the event, and must outlive him: if it
were closed, the child would read zeros.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from aiouffd.engine.statistics import Counter
from aiouffd.errors import PagerDiedError, encode_error
from aiouffd.kernel import files
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.limits import limit_error
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.pager.process import control, worker
from aiouffd.pager.process.deaths import Deaths
from aiouffd.pager.process.handles import (
    close_all,
    close_strays,
    explained,
    has_ended,
    is_open,
    open_descriptors,
    open_pidfd,
)
from aiouffd.pager.process.holder import Holder
from aiouffd.pager.process.inherited import INTERRUPT_BLOCKED_LOOP, SAY_WHAT_BLOCKS
from aiouffd.pager.process.journal import Whose
from aiouffd.pager.process.last_resort import Forsaken, LastResort
from aiouffd.pager.process.replay import last_meta, survey
from aiouffd.pager.process.serialization import config_of, modules
from aiouffd.pager.process.state import State

if TYPE_CHECKING:
    import socket

    from aiouffd.pager.process.child_descriptors import Vault
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
"""Seconds without a turn until the worker is killed, where the process that started the pager is gone."""

CALM = 60.0
"""A worker that has lived for so long, and was asked for nothing, has not died of what it was asked for."""

_TICK = 1.0
_CLONE_PAUSE = 0.5
_LOOK = 0.5  # seconds between looks whether the processes are still there
_CLONE_FILES = 0x400
_CLONE_PIDFD = 0x1000
_CLONE_CHILD_CLEARTID = 0x200000
_CLONE_CHILD_SETTID = 0x1000000
_PR_GET_TID_ADDRESS = 40
_SYS_CLONE = {"x86_64": 56}.get(os.uname().machine, 220)

_libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the GIL must be held across the clone
_python = ctypes.pythonapi


def _clone() -> tuple[int, int]:
    """fork(2), but with the table of descriptors shared; return pid and pidfd. The caller is single-threaded.

    Opened afterwards, the pidfd might find no room in the table, which the child is filling.
    """
    # glibc keeps the thread's id where set_tid_address points; its fork() has the kernel write the child's there.
    tid = ctypes.c_void_p()
    pidfd = ctypes.c_int(-1)
    flags = _CLONE_FILES | _CLONE_PIDFD | signal.SIGCHLD
    if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(tid), 0, 0, 0) == 0:
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    arguments: list[int | None] = [flags, None, ctypes.addressof(pidfd), tid.value, None]
    if os.uname().machine != "x86_64":
        arguments[3:] = [None, tid.value]  # the order of tls and child_tid is the architecture's
    _python.PyOS_BeforeFork()
    pid: int = _libc.syscall(ctypes.c_long(_SYS_CLONE), *(ctypes.c_void_p(item) for item in arguments))
    if pid == 0:
        _python.PyOS_AfterFork_Child()
    else:
        _python.PyOS_AfterFork_Parent()
        if pid < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"clone(CLONE_FILES) was refused: {os.strerror(number)}")
    return pid, pidfd.value


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
    worker.prepare()
    if hold is not None:
        _start_holder(Holder(journal, connection, *hold, open_pidfd(os.getpid())))
        for item in hold:  # the numbers are the holder's: closed here, they would be closed for it
            item.detach()
    own = {fd for fd in open_descriptors() if is_open(fd)}  # the list has its own number, which a worker's may get
    deaths = Deaths()
    died = ""
    while True:
        state = survey(journal) or State()
        slow = close_strays(own | state.numbers | {journal.descriptor(Whose.GUEST)})
        import_for(state)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid, pidfd = _clone()
        except OSError as error:
            if not _has_served(journal):
                return _refuse(connection, error)
            # To give up would be to close the descriptors of forked children, who would read zeros then.
            log.error("no worker can be started (%s): tried again", error.strerror)  # noqa: TRY400 - no traceback helps
            if not _anybody(journal) and _hung_up(connection):
                return 1
            time.sleep(_CLONE_PAUSE)
            continue
        if pid == 0:
            _work(journal, vault, connection, pickles, slow)
        if died:
            log.warning("%s and is replaced", died)
        began, faults = time.monotonic(), journal.total(Counter.FAULTS)
        status = _wait(pid, pidfd, journal)
        journal.note_descriptor(Whose.WORKER, -1)
        calm = journal.total(Counter.FAULTS) == faults and time.monotonic() - began > CALM
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return 0
        reason = f"signal {_name(-code)}" if code < 0 else f"exit status {code}"
        died = f"the worker (pid {pid}) died ({reason})"
        journal.counters.words[Counter.RESTARTS] += 1
        if deaths.add(code, journal.progress(), calm=calm):
            log.warning(died)
            return _give_up(journal, connection, deaths.count, reason)
        time.sleep(deaths.pause)


def _start_holder(holder: Holder) -> None:
    """Make the holder: it has the table of descriptors for as long as anybody needs it."""
    pid, pidfd = _clone()
    if pid == 0:
        try:
            holder.run()
        except BaseException:
            log.exception("the holder failed")
        finally:
            os._exit(1)
    os.close(pidfd)


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


def _wait(pid: int, pidfd: int, journal: Journal) -> int:
    """Wait for the worker's end; one whose loop does not turn is told to say where, to stop that, and killed.

    What counts is the time that the keeper itself has seen pass: when both were stopped (SIGSTOP, a frozen cgroup, a
    machine that was suspended) the worker has missed nothing.
    """
    words = journal.counters.words
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    beat, still, warned, interrupted = -1, 0.0, False, False
    last = time.monotonic()
    try:
        while not poller.poll(_TICK * 1000):
            now = time.monotonic()
            passed, last = min(now - last, 2 * _TICK), now
            if words[Counter.HEARTBEAT] != beat:
                beat, still, warned, interrupted = words[Counter.HEARTBEAT], 0.0, False, False
                continue
            still += passed
            state = _state_of(pid)
            if state == "t":  # a debugger has it
                continue
            if state == "Z":
                return _status_of_dying(pid, journal)
            if still > BLOCKED and not warned:
                warned = True
                _say_blocked(pid, still, state)
            elif still > HOPELESS and not interrupted:
                interrupted = True
                os.kill(pid, INTERRUPT_BLOCKED_LOOP)
            elif still > HOPELESS + GRACE or (still > ORPHANED and _orphaned(journal)):
                log.error("the worker's event loop has not turned for %.0f s: the worker is killed", still)
                os.kill(pid, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitpid(pid, 0)[1]


def _status_of_dying(pid: int, journal: Journal) -> int:
    """Return the status of a worker that has ended, but for threads that wait for a file system, whatever kills them.

    No code of it runs any more. Its status is not known yet: it has finished if it left nothing to be served.
    """
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        return status
    state = survey(journal)
    return signal.SIGKILL if state is not None and state.spaces else 0


def _say_blocked(pid: int, still: float, state: str) -> None:
    if state == "T":
        log.error("the worker (pid %d) has been stopped for %.0f s (SIGSTOP), and pages wait for it", pid, still)
        return
    log.error(
        "the worker's event loop has not turned for %.0f s: something blocks it, a handler or a source that"
        " waits without await. Where it is:",
        still,
    )
    os.kill(pid, SAY_WHAT_BLOCKS)


def _state_of(pid: int) -> str:
    """Return the state of a child that has not been waited for, as ps(1) shows it; nothing where there is no /proc."""
    try:
        return files.read(f"/proc/{pid}/stat").decode().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _orphaned(journal: Journal) -> bool:
    """Tell whether the process that has started the pager is gone."""
    meta = last_meta(journal.load().records)
    return meta is not None and meta.owner >= 0 and has_ended(meta.owner)


def _work(journal: Journal, vault: Vault, connection: socket.socket, pickles: Pickles, slow: list[int]) -> NoReturn:
    """Be the worker. Never returns into the keeper's frames; nothing is finalized, since descriptors are shared."""
    status = 1
    try:
        worker.run(journal, vault, connection, pickles, slow)
        status = 0
    except BaseException as error:
        log.exception("the worker failed")
        reason = limit_error("the pager's worker", getattr(error, "errno", None) or 0) or error
        with contextlib.suppress(Exception):
            control.send(connection, {"event": "failing", "error": encode_error(reason)}, wait=False)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _forsaken(journal: Journal) -> list[Forsaken]:
    state = survey(journal)
    return [
        Forsaken(
            Userfaultfd.from_fd(space.fd, Feature(space.features)),
            space.page_size,
            [(mapping.start, mapping.end) for mapping in space.mappings],
            space.token,
            is_child=space.is_child,
        )
        for space in (state.spaces.values() if state is not None else ())
    ]


def _has_served(journal: Journal) -> bool:
    """Tell whether anything has been served: then descriptors of forked children may be here."""
    return bool(journal.load().records)


def _refuse(connection: socket.socket, error: OSError) -> int:
    """Say why there is no worker, and end."""
    reason = explained("no worker could be started", error)
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
    log.error("%s; pages that are touched are poisoned from now on", error)
    connection.setblocking(False)
    outbox = control.Outbox(connection)
    _tell(outbox, {"event": "died", "error": encode_error(error)})
    resort = LastResort(_forsaken(journal))
    poller = select.poll()
    poller.register(resort.fileno(), select.POLLIN)
    poller.register(connection, select.POLLIN)
    looked = time.monotonic()
    while resort.spaces:
        poller.poll(1 if resort.pending else _LOOK * 1000)
        resort.attend()
        if not _answer(connection, outbox, resort, error):
            with contextlib.suppress(KeyError):
                poller.unregister(connection)
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
