"""The application's side: starts a pager, talks to it, and starts it again when it dies.

A thread of its own reads the answers and watches the keeper, so that neither depends on the application's event
loop, nor on there being one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import select
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, PagerDiedError, PagerStartError, UffdError, decode_error
from aiouffd.native.watchdog import Watch
from aiouffd.pager.client.orphan import Orphan, kill, mappings_of
from aiouffd.pager.client.request import FIRST, Request, fail
from aiouffd.pager.client.tenant import Pack, Tenant
from aiouffd.pager.process import control
from aiouffd.pager.process.journal import Journal
from aiouffd.pager.process.last_resort import Forsaken, LastResort
from aiouffd.pager.process.replay import survey

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.mappings import Mapping
    from aiouffd.engine.statistics import Statistics

__all__ = ["Pack", "PagerClient", "Tenant"]

log = logging.getLogger("aiouffd")

_START_TIMEOUT = 60.0
_KEEPERS = 5  # so many keepers in a row that died with no fault resolved between them
_PAUSES = (0.05, 0.2, 1.0, 5.0)  # seconds until what has failed is tried again
_SETTLING = 50  # milliseconds without a fault, until whoever waited has been let go


class _LeftError(Exception):
    """The client is being stopped."""


class PagerClient:
    """One pager, for any number of tenants. Thread-safe.

    Args:
        on_error: called from the client's thread with each error that the pager reports, and whom it is about; None:
            all, for the pager is given up.
        on_gone: called from there with each tenant whose process has ended.
        on_lost: called from there when no process of ours serves any more, and who waited has been let go; whoever
            has the memory settles it then. None: the thread stays, and poisons what is touched.
        guard: over the memory of this process that is served, if it is this process's; the client's from now on.
    """

    def __init__(
        self,
        *,
        on_error: Callable[[Tenant | None, BaseException], None],
        on_gone: Callable[[Tenant], None] = lambda _: None,
        on_lost: Callable[[], None] | None = None,
        guard: Watch | None = None,
    ) -> None:
        self._guard = guard or Watch(-1, None)
        self._on_error = on_error
        self._on_gone = on_gone
        self._on_lost = on_lost
        self._tenants: dict[str, Tenant] = {}
        self._lock = threading.RLock()
        self._pending: dict[int, Request] = {}
        self._next = 0
        self._closing = False
        self._dead: BaseException | None = None
        self._held = False  # requests wait until the successor has all that they speak of
        self._keepers = 0
        self._progress = -1
        self._journal: Journal | None = None
        self._connection: socket.socket | None = None
        self._outbox: control.Outbox | None = None
        self._orphans: list[Orphan] = []  # oldest first
        self._failures = 0  # to take over, in a row
        self._again = 0.0  # when that is tried again; 0: not at all
        self._keeper: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._keeper_fd = -1  # its pidfd, while it is listened to
        self._worker_pid = 0
        self._worker = -1  # its pidfd: a number might be another process's by the time that it is used
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="aiouffd-pager-client", daemon=True)

    # The caller's side

    def start(self) -> None:
        """Start the pager. Blocks for about a tenth of a second; it need not be ready then to be asked.

        Raises:
            PagerStartError: it did not start; `stop` it all the same.
        """
        self._spawn()
        self._thread.start()

    def open(self, tenant: Tenant) -> Future[Any]:
        """Have a tenant served; the future is done when it is.

        Its exception is a PagerStartError where what should serve could not be rebuilt there.
        """
        with self._lock:
            self._tenants[tenant.token] = tenant
        return self._open(tenant, tenant.mappings)

    def prepare(self, pack: Pack) -> Future[Any]:
        """Have made ready what will serve a tenant soon, so that it need not wait for that."""
        return self.request("prepare", None, pack.fds, service=pack.record)

    def open_wait(self, tenant: Tenant) -> None:
        """As `open`, and wait for it.

        Raises:
            PagerStartError: it is not served.
        """
        try:
            self.open(tenant).result(_START_TIMEOUT)
        except TimeoutError as error:
            raise PagerStartError(f"the pager did not answer in {_START_TIMEOUT:.0f} s") from error

    def forget(self, tenant: Tenant) -> None:
        """Be done with a tenant that is served no longer: its descriptor may be closed."""
        with self._lock:
            self._tenants.pop(tenant.token, None)

    def request(
        self, op: str, tenant: Tenant | None = None, fds: list[int] | None = None, **arguments: Any
    ) -> Future[Any]:
        """Send a request; the future gives its answer. It is sent again to a worker that succeeds a dead one.

        Raises:
            ClosedError, PagerDiedError: nobody is there to be asked.
        """
        with self._lock:
            if self._closing or self._dead is not None:
                raise self._dead or ClosedError("the Monitor has been left")
            self._next += 1
            message = {"op": op, "id": self._next, "token": tenant.token if tenant else None, **arguments}
            request = self._pending[self._next] = Request(message, fds or [])
            if not self._held or request.rank < len(FIRST):
                self._send(request)
        return request.future

    def statistics(self) -> Statistics:
        """Read the counters: shared memory, no round trip."""
        assert self._journal is not None
        return self._journal.counters.snapshot()

    @property
    def pids(self) -> tuple[int, int]:
        """Keeper and worker, as far as known."""
        return (self._keeper.pid if self._keeper else 0, self._worker_pid)

    def refuse(self, tenant: Tenant) -> None:
        """Have nothing more brought to a tenant, which its owner settles next: a touch until then is SIGBUS."""
        with contextlib.suppress(UffdError, TimeoutError):
            self.request("refuse", tenant).result(10.0)

    def close(self, tenant: Tenant) -> None:
        """Have a tenant served no longer, which its owner has settled; forked children are served on."""
        try:
            self.request("close", tenant, poison=False).result(10.0)
            self.forget(tenant)
        except (UffdError, TimeoutError):
            if self._dead is not None:  # its keeper poisons what is touched, and must let go of this
                with self._lock:
                    self._send(Request({"op": "close", "id": 0, "token": tenant.token}, []))

    def stop(self, *, leave: bool = False) -> None:
        """End the client's side, and the pager's processes with it where they have nothing left to serve.

        Args:
            leave: the pager goes on until all tenants are gone.
        """
        with self._lock:
            self._closing = True
            pending, self._pending = self._pending, {}
        os.write(self._wake_w, b"x")
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(10.0)
        self._guard.close()
        for request in pending.values():
            fail(request.future, ClosedError("the Monitor has been left"))
        if self._connection is not None:
            self._connection.close()
        leave = leave or self._forked
        for orphan in self._orphans:
            if not leave and orphan.lives:
                kill(orphan.worker)
        self._disown()
        if self._keeper is not None:
            self._reap(self._keeper, leave=leave)
        self._forget_worker()
        for fd in (self._wake_r, self._wake_w):
            os.close(fd)

    # The thread's side

    def _spawn(self) -> None:
        """Start a keeper and wait for its hello."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # -P: the working directory is not put in front of sys.path. A session of its own: Ctrl-C is not for it.
            keeper = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "aiouffd.pager", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise PagerStartError(f"{sys.executable!r} could not be started: {error}") from error
        finally:
            theirs.close()
        try:
            journal = self._hello(ours)
        except (control.Closed, OSError, ValueError) as error:
            ours.close()
            keeper.kill()
            status = keeper.wait()
            raise PagerStartError(
                f"`{sys.executable} -m aiouffd.pager` ended with status {status} before it said hello;"
                " its standard error tells why (is aiouffd installed for this interpreter?)"
            ) from error
        with self._lock:
            self._keeper, self._is_ready = keeper, False
            self._journal, self._connection, self._outbox = Journal(journal), ours, control.Outbox(ours)
        os.close(journal)

    def _hello(self, connection: socket.socket) -> int:
        """Return the descriptor of the journal; OSError where the client is stopped meanwhile, or it takes too long."""
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        poller.register(self._wake_r, select.POLLIN)
        until = time.monotonic() + _START_TIMEOUT
        while (left := until - time.monotonic()) > 0 and not self._closing:
            self._guard.alive()
            if connection.fileno() in {fd for fd, _ in poller.poll(min(left, 1.0, self._guard.beat) * 1000)}:
                _, (journal,) = control.receive(connection)
                return journal
            self._drain()
        raise TimeoutError("no hello")

    def _open(self, tenant: Tenant, mappings: list[Mapping]) -> Future[Any]:
        pidfd = os.pidfd_open(os.getpid())
        try:
            future = self.request(
                "open",
                tenant,
                [pidfd, *tenant.pack.fds, *tenant.fds],
                service=tenant.pack.record,
                space={
                    "token": tenant.token,
                    "page_size": tenant.page_size,
                    "features": int(tenant.uffd.features),
                    "mappings": [attrs.astuple(mapping) for mapping in mappings],
                },
                own=len(tenant.fds),
            )
        except BaseException:
            os.close(pidfd)
            raise
        future.add_done_callback(lambda _: os.close(pidfd))
        return future

    def _send(self, request: Request) -> None:
        """Send a request, or have it sent when there is room; what cannot be sent at all has failed."""
        if self._outbox is None or request.future.done():  # canceled: its descriptors may be closed
            return
        try:
            self._outbox.put(request.message, request.fds)
        except control.Closed:
            return  # the pager is gone: sent again to its successor
        except OSError as error:
            self._pending.pop(request.message["id"], None)
            fail(request.future, PagerStartError(f"{request.message['op']} cannot be sent to the pager: {error}"))
            return
        if self._outbox and threading.current_thread() is not self._thread:
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake_w, b"x")

    def _resend(self) -> None:
        """Send all that is not answered yet, in an order that makes sense."""
        with self._lock:
            waiting = sorted(self._pending.values(), key=lambda request: request.rank)
            for request in waiting:
                if not self._held or request.rank < len(FIRST):
                    self._send(request)

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # noqa: BLE001 - whatever it is, who waits for a page must be let go
            if self._closing:  # nothing can be asked for any more, a takeover neither
                return
            self._give_up(error if isinstance(error, UffdError) else PagerDiedError(f"the client failed: {error!r}"))
            self._forsake()

    def _watch(self) -> None:
        """Listen to the pager, and replace it when it ends, until the client is stopped."""
        assert self._keeper is not None
        while True:
            # The worker holds the socket too: only the keeper's own end tells of its death.
            self._keeper_fd = os.pidfd_open(self._keeper.pid)
            try:
                self._listen(self._keeper_fd)
            finally:
                os.close(self._keeper_fd)
            if self._closing:
                return
            if self._dead is not None:  # it was given up, and has poisoned what was touched, until now
                self._forsake()
                return
            try:
                self._replace()
            except _LeftError:
                return

    def _listen(self, keeper: int) -> None:
        """Handle messages until the keeper ends, or the client is stopped."""
        connection, outbox = self._connection, self._outbox
        assert connection is not None
        assert outbox is not None
        poller = select.poll()
        hears = True
        for fd in (keeper, self._wake_r):
            poller.register(fd, select.POLLIN)
        while not self._closing:
            if hears:
                poller.register(connection, select.POLLIN | (select.POLLOUT if outbox else 0))
            if not self._is_ready:
                self._guard.alive()
            ready = dict(poller.poll(self._patience()))
            if self._again and time.monotonic() >= self._again:
                self._again = 0.0
                self._take_over()
            if self._wake_r in ready:
                self._drain()
            events = ready.get(connection.fileno(), 0) if hears else 0
            try:
                if events & select.POLLOUT:
                    with self._lock:
                        outbox.flush()
                if events & ~select.POLLOUT:
                    self._handle(*control.receive(connection))
            except (control.Closed, OSError) as error:
                if isinstance(error, control.DescriptorsLostError):
                    log.error("%s", error)  # noqa: TRY400 - no traceback helps here
                    self._handle(error.message, [])
                    continue
                hears = False
                poller.unregister(connection)
            except Exception:
                log.exception("a message of the pager could not be handled")
            if not events and keeper in ready:
                return

    def _patience(self) -> float | None:
        """Return for how many milliseconds to wait for messages."""
        seconds = math.inf if self._is_ready else self._guard.beat
        if self._again:
            seconds = min(seconds, max(0.0, self._again - time.monotonic()))
        return None if seconds == math.inf else seconds * 1000 + 1

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        event = message.get("event")
        if event == "ready":
            self._forget_worker()
            self._worker_pid, self._worker = message["pid"], fds[0] if fds else -1
            # The first finds all that was sent in the socket. Any other is the successor of one that died with it.
            if self._is_ready:
                self._resend()
            self._is_ready = True
            self._guard.over(*((self._keeper_fd, self._worker) if self._worker >= 0 else ()))
        elif event == "gone":
            tenant = self._tenants.get(message["token"])
            if tenant is not None:
                self._on_gone(tenant)
        elif event == "error":
            tenant = self._tenants.get(message["token"])
            if tenant is not None:
                self._on_error(tenant, decode_error(message["error"]))
        elif event == "died":
            self._give_up(decode_error(message["error"]))
        else:
            with self._lock:
                request = self._pending.pop(message["id"], None)
            if request is None:
                return
            if "error" in message:
                fail(request.future, decode_error(message["error"]))
            else:
                with contextlib.suppress(InvalidStateError):  # canceled
                    request.future.set_result(message["ok"])

    def _give_up(self, error: BaseException) -> None:
        self._guard.close()
        with self._lock:
            self._dead = error
            pending, self._pending = self._pending, {}
        for request in pending.values():
            fail(request.future, error)
        self._on_error(None, error)

    def _replace(self) -> None:
        """The keeper is gone: have the worker hand over what it serves, and give it to a new pair.

        While nobody reads, touches wait: this process holds a duplicate of the descriptor.
        """
        assert self._journal is not None
        assert self._keeper is not None
        assert self._connection is not None
        self._guard.alive()
        status = self._keeper.wait()
        resolved = self._journal.counters.progress()
        self._keepers = 1 if resolved != self._progress else self._keepers + 1
        self._progress = resolved
        if self._keepers >= _KEEPERS:
            raise PagerDiedError(f"{_KEEPERS} pagers died with no fault resolved between them (status {status})")
        log.warning("the pager's keeper (pid %d) died (status %d) and is replaced", self._keeper.pid, status)
        with self._lock:
            self._held = True
            self._orphans.append(Orphan(self._connection, self._journal, self._worker))
            self._worker = -1
            for number in [number for number, item in self._pending.items() if item.message["op"] == "takeover"]:
                del self._pending[number]  # it is begun anew
        self._again, self._failures = 0.0, 0
        # An orphaned worker serves on while its successor starts, and hands over to it directly: this thread may not
        # get the GIL in between, since whoever holds it may be waiting for a page.
        self._spawn_in_time()
        self._take_over()

    def _spawn_in_time(self) -> None:
        """Start a keeper; while the orphaned worker serves on, for as long as that takes."""
        for attempt in itertools.count():
            try:
                self._spawn()
            except PagerStartError as error:
                if attempt >= _KEEPERS and not any(orphan.lives for orphan in self._orphans):
                    raise
                log.warning("%s; tried again", error)
            else:
                return
            poller = select.poll()
            poller.register(self._wake_r, select.POLLIN)
            until = time.monotonic() + _PAUSES[min(attempt, len(_PAUSES) - 1)]
            while (left := until - time.monotonic()) > 0 and not self._closing:
                self._guard.alive()
                if poller.poll(min(left, self._guard.beat) * 1000):
                    self._drain()
            if self._closing:
                raise _LeftError

    def _take_over(self) -> None:
        """Have the new worker take over from whichever of its predecessors serves the region.

        That is the oldest one that lives: a worker ends only when its successor has all.
        """
        orphan = next((orphan for orphan in self._orphans if orphan.lives), None)
        if orphan is None:
            self._open_from_journal()
            return
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                control.send(orphan.connection, {"op": "handover", "id": 0}, [theirs.fileno()], wait=False)
        except (control.Closed, OSError) as error:  # it has just ended; or its loop does not turn
            ours.close()
            self._take_over_again(error)
            return
        future = self.request("takeover", None, [ours.fileno()])

        def taken(future: Future[Any]) -> None:
            ours.close()
            error = future.exception()
            if error is None:
                self._taken()
            elif not self._closing and self._dead is None:
                self._take_over_again(error)

        future.add_done_callback(taken)

    def _take_over_again(self, error: BaseException) -> None:
        if not any(orphan.lives for orphan in self._orphans):
            self._open_from_journal()
            return
        pause = _PAUSES[min(self._failures, len(_PAUSES) - 1)]
        self._failures += 1
        self._again = time.monotonic() + pause
        log.warning("the worker without a keeper serves on (%s); tried again", error)

    def _taken(self) -> None:
        """The new worker has all: what waits may be asked of it."""
        self._disown()
        with self._lock:
            self._held = False
            self._resend()

    def _open_from_journal(self) -> None:
        """All workers that have served are dead: what is shown is in the newest journal that was used."""
        states = [(survey(orphan.journal), orphan.journal) for orphan in reversed(self._orphans)]
        state, journal = next((item for item in states if item[0] is not None), states[-1])
        with self._lock:
            tenants = list(self._tenants.values())
            asked = {item.message["token"] for item in self._pending.values() if item.message["op"] == "open"}
        if journal.counters.words[Counter.SPACES] > len(tenants):
            log.error("keeper and worker died together: forked children are served no longer")
        assert self._journal is not None
        self._journal.counters.words[:] = journal.counters.words
        for tenant in tenants:
            if tenant.token not in asked:
                self._open(tenant, mappings_of(state, tenant))
        self._taken()

    def _disown(self) -> None:
        """Be done with the workers before this one; what they had still to say is heard."""
        orphans, self._orphans = self._orphans, []
        for orphan in orphans:
            with contextlib.suppress(control.Closed, OSError):
                while not self._closing:
                    orphan.connection.setblocking(False)
                    message, fds = control.receive(orphan.connection)
                    for fd in fds:
                        os.close(fd)
                    if message.get("event") in ("error", "gone"):
                        self._handle(message, [])
            orphan.close()

    def _forsake(self) -> None:
        """Nobody of ours serves any more: whoever waits, or touches a missing page, gets SIGBUS. No hang, no zeros."""
        state = survey(self._journal) if self._journal is not None else None
        resort = LastResort(
            Forsaken(
                tenant.uffd,
                tenant.page_size,
                [(mapping.start, mapping.end) for mapping in mappings_of(state, tenant)],
                tenant.token,
            )
            for tenant in list(self._tenants.values())
        )
        poller = select.poll()
        poller.register(resort.fileno(), select.POLLIN)
        poller.register(self._wake_r, select.POLLIN)
        while not self._closing:
            ready = poller.poll(1 if resort.pending else _SETTLING)
            if self._wake_r in dict(ready):
                self._drain()
            if not resort.attend() and not ready and self._on_lost is not None:
                self._on_lost()
                break
            for token in {space.token for space in resort.spaces.values()} - self._tenants.keys():
                resort.forget(token)
        resort.close()

    @property
    def _forked(self) -> bool:
        journals = [orphan.journal for orphan in self._orphans] + ([self._journal] if self._journal else [])
        return any(journal.counters.words[Counter.SPACES] > len(self._tenants) for journal in journals)

    def _forget_worker(self) -> None:
        if self._worker >= 0:
            os.close(self._worker)
            self._worker = -1

    def _reap(self, keeper: subprocess.Popen[bytes], *, leave: bool) -> None:
        """Wait for the pager's end, and bring it about where something blocks its loop."""
        try:
            keeper.wait(0.2 if leave else 5.0)
        except subprocess.TimeoutExpired:
            if leave:  # it goes on serving until nobody is left; no zombie may be left then
                threading.Thread(target=keeper.wait, name="aiouffd-reaper", daemon=True).start()
                return
            keeper.kill()
            keeper.wait()
        if self._worker >= 0 and not leave:
            poller = select.poll()
            poller.register(self._worker, select.POLLIN)
            if not poller.poll(1000):  # it was killed above, or before: a worker that goes on has not heard of the end
                kill(self._worker)
