"""The application's side: starts a pager, talks to it, and starts it again when it dies.

A thread of its own reads the answers and watches the keeper, so that neither depends on the application's event
loop, nor on there being one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.resolver import Op, Resolver, Run
from aiouffd.engine.statistics import Counter, Counters
from aiouffd.errors import ClosedError, PagerDiedError, PagerStartError, UffdError, decode_error
from aiouffd.kernel import abi
from aiouffd.pager import control
from aiouffd.pager.journal import Journal
from aiouffd.pager.travel import pack

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.assembly import Options, Service
    from aiouffd.engine.statistics import Statistics
    from aiouffd.kernel.userfaultfd import Userfaultfd

__all__ = ["Pack", "PagerClient", "Tenant"]

log = logging.getLogger("aiouffd")

_tokens = itertools.count()
_START_TIMEOUT = 60.0
_KEEPERS = 5  # so many keepers in a row that died with no fault resolved between them


class Pack:
    """A service made ready to travel: a pickle in a memfd, and the descriptors that go along.

    Args:
        service: what serves. Stays the caller's, who keeps its descriptors open as long as the pack is used.
        options: how.

    Raises:
        PagerStartError: it cannot travel.
    """

    def __init__(self, service: Service, options: Options) -> None:
        data, descriptors = pack(service)
        self.service = service
        self.token = f"{os.getpid()}-{next(_tokens)}"  # a request that is sent twice opens once
        self.options = attrs.asdict(options)
        self.config = os.memfd_create("aiouffd-config", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(self.config), "wb") as file:
            file.write(data)
        self._descriptors = descriptors

    @property
    def record(self) -> dict[str, Any]:
        """What a pager is told of it."""
        return {"token": self.token, "options": self.options, "path": [entry for entry in sys.path if entry]}

    @property
    def fds(self) -> list[int]:
        """What goes along with a request that opens a space."""
        return [self.config, *(item.fd for item in self._descriptors)]

    def close(self) -> None:
        """Forget it; what a pager has got of it stays the pager's."""
        if self.config >= 0:
            os.close(self.config)
            self.config = -1


@attrs.define(eq=False)
class Tenant:
    """Memory that a pager serves.

    Attributes:
        pack: what serves it.
        uffd: stays its owner's, and must stay open as long as the tenant: it is what makes touches wait, instead of
            reading zeros, while no pager is there.
        mappings: what it showed when it was opened.
        page_size: bytes.
        tether: a descriptor that the worker holds open as long as it serves the tenant; -1: none.
        token: names it.
    """

    pack: Pack
    uffd: Userfaultfd
    mappings: list[Mapping]
    page_size: int
    tether: int = -1
    token: str = attrs.field(factory=lambda: f"{os.getpid()}-{next(_tokens)}")

    @property
    def fds(self) -> list[int]:
        """What goes along with a request that opens it."""
        return [self.uffd.fileno()] + ([self.tether] if self.tether >= 0 else [])


class PagerClient:
    """One pager, for any number of tenants. Thread-safe.

    Args:
        on_error: called from the client's thread with each error that the pager reports, and whom it is about; None:
            all, for the pager is given up.
        on_gone: called from there with each tenant whose process has ended.
    """

    def __init__(
        self,
        *,
        on_error: Callable[[Tenant | None, BaseException], None],
        on_gone: Callable[[Tenant], None] = lambda _: None,
    ) -> None:
        self._on_error = on_error
        self._on_gone = on_gone
        self._tenants: dict[str, Tenant] = {}
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[dict[str, Any], list[int], Future[Any]]] = {}
        self._next = 0
        self._closing = False
        self._dead: BaseException | None = None
        self._keepers = 0
        self._progress = -1
        self._journal: Journal | None = None
        self._connection: socket.socket | None = None
        self._owners: list[tuple[socket.socket, Journal]] = []  # workers without a keeper, oldest first
        self._keeper: subprocess.Popen[bytes] | None = None
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
        """Send a request; the future gives its answer. It is sent again to a worker that succeeds a dead one."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closing or self._dead is not None:
                raise self._dead or ClosedError("the Monitor has been left")
            self._next += 1
            message = {"op": op, "id": self._next, "token": tenant.token if tenant else None, **arguments}
            self._pending[self._next] = (message, fds or [], future)
            self._send(message, fds or [])
        return future

    def statistics(self) -> Statistics:
        """Read the counters: shared memory, no round trip."""
        assert self._journal is not None
        return self._journal.counters.snapshot()

    @property
    def pids(self) -> tuple[int, int]:
        """Keeper and worker, as far as known."""
        return (self._keeper.pid if self._keeper else 0, self._worker_pid)

    def close(self, tenant: Tenant, *, poison: bool) -> None:
        """Have a tenant served no longer. What is waited for is poisoned, if asked; forked children are served on."""
        with contextlib.suppress(UffdError, TimeoutError):
            self.request("close", tenant, poison=poison).result(10.0)
            self.forget(tenant)

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
        for _, _, future in pending.values():
            if not future.done():
                future.set_exception(ClosedError("the Monitor has been left"))
        if self._connection is not None:
            self._connection.close()
        self._disown()
        if self._keeper is not None:
            self._reap(self._keeper, leave=leave or self._forked)
        self._forget_worker()
        for fd in (self._wake_r, self._wake_w):
            os.close(fd)

    # The thread's side

    def _spawn(self) -> None:
        """Start a keeper and wait for its hello."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # -P: the working directory is not put in front of sys.path. A session of its own: Ctrl-C is not for it.
            self._keeper = subprocess.Popen(  # noqa: S603
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
        ours.settimeout(_START_TIMEOUT)
        try:
            _, (journal,) = control.receive(ours)
        except (control.Closed, TimeoutError, ValueError) as error:
            ours.close()
            self._keeper.kill()
            status = self._keeper.wait()
            raise PagerStartError(
                f"`{sys.executable} -m aiouffd.pager` ended with status {status} before it said hello;"
                " its standard error tells why (is aiouffd installed for this interpreter?)"
            ) from error
        ours.settimeout(None)
        with self._lock:
            self._journal, self._connection = Journal(journal), ours
        os.close(journal)

    def _open(self, tenant: Tenant, mappings: list[Mapping]) -> Future[Any]:
        pidfd = os.pidfd_open(os.getpid())
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
        future.add_done_callback(lambda _: os.close(pidfd))
        return future

    def _send(self, message: dict[str, Any], fds: list[int]) -> None:
        assert self._connection is not None
        with contextlib.suppress(control.Closed, OSError):  # the keeper is gone: sent again by its successor
            control.send(self._connection, message, fds)

    def _run(self) -> None:
        while self._served():
            try:
                self._restart()
            except UffdError as error:
                self._poison()
                self._give_up(error)
                return

    def _served(self) -> bool:
        """Handle messages as long as the keeper lives; tell whether there must be another one."""
        assert self._connection is not None
        assert self._keeper is not None
        # The worker holds the socket too: only the keeper's own end tells of its death.
        keeper = os.pidfd_open(self._keeper.pid)
        try:
            self._listen(self._connection, keeper)
        finally:
            os.close(keeper)
        return not self._closing and self._dead is None

    def _listen(self, connection: socket.socket, keeper: int) -> None:
        """Handle messages until the keeper ends, or the client is stopped."""
        poller = select.poll()
        for fd in (connection.fileno(), keeper, self._wake_r):
            poller.register(fd, select.POLLIN)
        while not self._closing:
            ready = {fd for fd, _ in poller.poll()}
            if connection.fileno() in ready:
                try:
                    self._handle(*control.receive(connection))
                except (control.Closed, OSError):
                    poller.unregister(connection)
            elif keeper in ready:
                return

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        event = message.get("event")
        if event == "ready":
            self._worker_pid = message["pid"]
            self._forget_worker()
            with contextlib.suppress(ProcessLookupError):  # it has died again already
                self._worker = os.pidfd_open(self._worker_pid)
            # Perhaps the successor of one that died with our requests.
            with self._lock:
                first = [item for item in self._pending.values() if item[0]["op"] == "takeover"]
                for request, attached, _ in first or self._pending.values():
                    self._send(request, attached)
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
            _, _, future = self._pending.pop(message["id"], (None, None, None))
            if future is None or future.done():
                for fd in fds:
                    os.close(fd)
            elif "error" in message:
                future.set_exception(decode_error(message["error"]))
            else:
                future.set_result({**(message["ok"] or {}), "fds": fds})

    def _give_up(self, error: BaseException) -> None:
        with self._lock:
            self._dead = error
            pending, self._pending = self._pending, {}
        for _, _, future in pending.values():
            future.set_exception(error)
        self._on_error(None, error)

    def _restart(self) -> None:
        """The keeper is gone: have the worker hand over what it serves, and give it to a new pair.

        While nobody reads, touches wait: this process holds a duplicate of the descriptor.
        """
        assert self._journal is not None
        assert self._keeper is not None
        status = self._keeper.wait()
        resolved = self.statistics().pages
        self._keepers = 1 if resolved != self._progress else self._keepers + 1
        self._progress = resolved
        if self._keepers >= _KEEPERS:
            raise PagerDiedError(f"{_KEEPERS} pagers died with no fault resolved between them (status {status})")
        log.warning("the pager's keeper (pid %d) died (status %d) and is replaced", self._keeper.pid, status)
        assert self._connection is not None
        self._owners.append((self._connection, self._journal))
        with self._lock:  # a takeover that was under way is begun anew
            for number in [number for number, item in self._pending.items() if item[0]["op"] == "takeover"]:
                del self._pending[number]
        # An orphaned worker serves on while its successor starts, and hands over to it directly: this thread may not
        # get the GIL in between, since whoever holds it may be waiting for a page.
        self._spawn()
        self._take_over()

    def _take_over(self) -> None:
        """Have the new worker take over from whichever of its predecessors serves the region.

        That is the oldest one that lives: a worker ends only when its successor has acknowledged that it has all.
        """
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for connection, _ in self._owners:
                with contextlib.suppress(control.Closed, OSError):
                    control.send(connection, {"op": "handover", "id": 0}, [theirs.fileno()])
                    break
            else:
                ours.close()
                self._open_from_journal()
                return
        future = self.request("takeover", None, [ours.fileno()])

        def taken(future: Future[Any]) -> None:
            ours.close()
            if future.exception() is None:
                self._disown()
                self._resend()
            else:
                self._take_over()

        future.add_done_callback(taken)

    def _open_from_journal(self) -> None:
        """All workers that have served are dead: what is shown is in the newest journal that was used."""
        journal = next((item for _, item in reversed(self._owners) if item.load()[0] is not None), self._owners[0][1])
        with self._lock:
            tenants = list(self._tenants.values())
        if journal.counters.words[Counter.SPACES] > len(tenants):
            log.error("keeper and worker died together: forked children are served no longer")
        assert self._journal is not None
        self._journal.counters.words[:] = journal.counters.words
        shown = [(tenant, _mappings(journal, tenant)) for tenant in tenants]
        self._disown()
        for tenant, mappings in shown:
            self._open(tenant, mappings)
        self._resend()

    def _disown(self) -> None:
        for connection, _ in self._owners:
            connection.close()
        self._owners.clear()

    def _resend(self) -> None:
        with self._lock:
            for request, attached, _ in self._pending.values():
                self._send(request, attached)

    def _poison(self) -> None:
        """Nobody will serve any more: whoever waits, or touches a missing page, gets SIGBUS. No hang, no zeros."""
        assert self._journal is not None
        for tenant in self._tenants.values():
            resolver = Resolver(tenant.uffd, tenant.page_size, Counters())
            for mapping in _mappings(self._journal, tenant):
                resolver.settle(Run(Op.POISON, mapping.start, mapping.offset, mapping.end - mapping.start), wake=True)

    @property
    def _forked(self) -> bool:
        return self._journal is not None and self._journal.counters.words[Counter.SPACES] > len(self._tenants)

    def _forget_worker(self) -> None:
        if self._worker >= 0:
            os.close(self._worker)
            self._worker = -1

    def _reap(self, keeper: subprocess.Popen[bytes], *, leave: bool) -> None:
        try:
            keeper.wait(0.2 if leave else 5.0)
        except subprocess.TimeoutExpired:
            if not leave:  # something blocks the worker's loop, so that it did not hear of the end
                keeper.kill()
                keeper.wait()
                if self._worker >= 0:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(self._worker, signal.SIGKILL)
            else:  # it goes on serving until nobody is left; no zombie may be left then
                threading.Thread(target=keeper.wait, name="aiouffd-reaper", daemon=True).start()


def _mappings(journal: Journal, tenant: Tenant) -> list[Mapping]:
    """Return what a tenant shows now, from the journal of a pager that is gone."""
    state, events = journal.load()
    mappings = Mappings(tenant.mappings)
    identity = -1
    for item in state["spaces"] if state is not None else ():
        if item["token"] == tenant.token and not item["child"]:
            identity = item["id"]
            mappings = Mappings(Mapping(*each) for each in item["mappings"])
    for space, message in events:
        if space != identity:
            continue
        if message[0] == abi.EVENT_REMAP:
            mappings.remap(*abi.REMAP_MESSAGE.unpack(message))
        elif message[0] == abi.EVENT_REMOVE:
            mappings.remove(*abi.RANGE_MESSAGE.unpack(message))
        elif message[0] == abi.EVENT_UNMAP:
            mappings.unmap(*abi.RANGE_MESSAGE.unpack(message))
    return list(mappings)
