"""The application's side: starts a pager, asks it, and replaces it when it dies.

A thread of its own reads the answers and watches the keeper, so that neither depends on the application's event loop,
nor on there being one.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - asyncio.to_thread imports it when it is first called
import contextlib
import logging
import math
import os
import select
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, HandoffError, PagerDiedError, PagerStartError, UffdError
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.limits import no_thread
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.kernel.userfaultfd import kernel_features
from aiouffd.pager.client.abandoned import poison_what_is_touched
from aiouffd.pager.client.asking import Asking
from aiouffd.pager.client.holding import Holding
from aiouffd.pager.client.pair import Pair
from aiouffd.pager.client.takeover import Takeover
from aiouffd.pager.client.tenant import Slots, Tenant, root_of
from aiouffd.pager.client.waiting import LOOK, Later, StoppedError, Waiter, Watches
from aiouffd.pager.process import control
from aiouffd.pager.process.deaths import Deaths
from aiouffd.pager.process.handles import open_pidfd
from aiouffd.pager.process.replay import survey
from aiouffd.pager.process.serialization import Pickles
from aiouffd.rpc import LAST_REQUEST, Request

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from aiouffd.engine.mappings import Mappings
    from aiouffd.engine.statistics import Statistics
    from aiouffd.pager.client.launch import Launched
    from aiouffd.pager.client.packing import Pack
    from aiouffd.pager.process.journal import Journal

__all__ = ["PagerClient"]

log: logging.Logger = logging.getLogger("aiouffd")

_LEFT = "the Monitor has been left"
_TOLD = 0.2  # seconds


def _with_reason(error: BaseException, reason: BaseException | None) -> BaseException:
    if reason is None:
        return error
    told = type(error)(f"{error}: {reason}")
    told.__cause__ = reason
    return told


def _received(pair: Pair) -> tuple[dict[str, Any], list[int]] | None:
    """Return what the pager has sent, and what came along; None: there was nothing.

    Raises:
        control.Closed: nobody sends any more.
        ValueError, HandoffError: something was sent, and cannot be had.
    """
    try:
        return control.receive(pair.connection)
    except BlockingIOError:
        return None
    except control.DescriptorsLostError as error:
        log.error("%s", error)  # noqa: TRY400 - no traceback helps here
        return error.message, []
    except OSError as error:
        if not pair.worker_lives:
            raise control.Closed from error
        raise HandoffError("the pager", f"has sent what cannot be received: {error}") from error


def _ready(pair: Pair, waiter: Waiter, milliseconds: float, *, hears: bool) -> dict[int, int]:
    """Wait for messages, or the end of whoever sees to it that there is a worker; return what is ready.

    Where nobody does any more it only looks: else a worker that answers all the time would keep that from being seen.
    """
    guard, poller = pair.guard, select.poll()
    for source in (guard, waiter, pair.channel):
        if source is not None:
            poller.register(source, select.POLLIN)
    if hears:
        poller.register(pair.connection, select.POLLIN | (select.POLLOUT if pair.outbox else 0))
    return dict(poller.poll(milliseconds if guard is not None else 0))


class PagerClient:
    """One pager, for any number of tenants. Thread-safe.

    Args:
        on_error: called from the client's thread with each error that the pager reports, and whose it is; None: all
            tenants', since the pager is given up.
        on_gone: called from there with each tenant whose process has ended.
        on_flight: called from there with a tenant and what is told of a flight of it: see `Landings`.
        on_lost: called from there when no process of ours serves any more, and all that waited have been let go; the
            owners of the memory settle it then. None: the thread stays, and poisons what is touched.
        pickles: how often the pager unpickles a source or handler that this process sends.

    Attributes:
        lives: tells whether keeper or worker is there, whether it answers or not.
        resume: has them go on, if they were stopped.
        slots: where tenants are counted: `take_slot`.
        holding: what outlives the pager.
    """

    def __init__(
        self,
        *,
        on_error: Callable[[Tenant | None, BaseException], None],
        on_gone: Callable[[Tenant], None] = lambda _: None,
        on_flight: Callable[[Tenant, dict[str, Any]], None] = lambda *_: None,
        on_lost: Callable[[], None] | None = None,
        pickles: Pickles = Pickles.ONCE,
    ) -> None:
        self._on_error, self._on_lost = on_error, on_lost
        self._on_gone, self._on_flight = on_gone, on_flight
        self._tenants: dict[str, Tenant] = {}
        self._waiter = Waiter(Watches())
        self._requests = Asking(self._waiter)
        self.lives: Callable[[], bool] = self._requests.may_be_heard
        self.resume: Callable[[], None] = self._requests.resume
        self.holding: Holding = Holding(self._requests, self._waiter, self._tenants, self._open)
        self._start_pair = self.holding.starting(partial(Pair.start, self._waiter, pickles))
        self._takeover = Takeover(
            self._requests,
            self._start_pair,
            self._waiter,
            reopen=self.holding.reopen,
            taken=self.holding.succeeded,
            hear=self._event,
        )
        self._worker_pid = 0
        self.slots: Slots = Slots()
        self._later = Later()
        self._silent = False  # a last request was not answered: something blocks the worker's loop
        self._dead: BaseException | None = None
        self._reason: BaseException | None = None
        self._deaths = Deaths()  # of keepers
        self._progress = 0
        self._thread = threading.Thread(target=self._run, name="aiouffd-pager-client", daemon=True)

    # The caller's side

    def start(self, launched: Launched | None = None) -> None:
        """Start the pager. Blocks for about a tenth of a second; it need not be ready then to be asked.

        Args:
            launched: the process, which is this client's from now on; None: it is started now.

        Raises:
            PagerStartError: it did not start; `stop` it all the same.
        """
        self._requests.pair = self._start_pair(launched)
        self._requests.counting = self._requests.pair.journal
        try:
            self._thread.start()
        except RuntimeError as error:
            raise PagerStartError(str(no_thread("a thread that hears the pager"))) from error

    def open(self, tenant: Tenant) -> Future[Any]:
        """Have a tenant served; the future is done when it is.

        Its exception is a PagerStartError where the source or handler could not be rebuilt in the pager.
        """
        self.add(tenant)
        return self._open(tenant, tenant.mappings, tenant.counts)

    def add(self, tenant: Tenant) -> None:
        """Have a tenant that is opened otherwise: `Holding.restore`."""
        self.holding.put(tenant)
        with self._requests.lock:
            self._tenants[tenant.token] = tenant
            tenant.restarts = self.journal.counters.words[Counter.RESTARTS]
            self._waiter.watch.add(tenant.watch)
            tenant.watch.over(*self._ends)

    def prepare(self, pack: Pack) -> Future[Any]:
        """Have a source made ready that will serve a tenant soon, so that the tenant need not wait for that."""
        return self._requests("prepare", pack.fds, token=None, service=pack.record)

    def expect(self) -> None:
        """Have the pager ready to replay a recording of an object that a server has."""
        with contextlib.suppress(UffdError):  # whoever opens a tenant is told
            self._requests("expect", token=None)

    def forget(self, tenant: Tenant) -> None:
        """Be done with a tenant that is served no longer: its descriptor may be closed."""
        with self._requests.lock:
            self._tenants.pop(tenant.token, None)
            self.slots.give_back(tenant.slot)
            tenant.slot = 0
        self.holding.remove(tenant)
        self._waiter.watch.remove(tenant.watch)

    def request(self, op: str, tenant: Tenant, **arguments: Any) -> Future[Any]:
        """Send a request; the future gives its answer. It is sent again to a worker that succeeds a dead one.

        Raises:
            ClosedError, PagerDiedError: nobody is there to be asked.
        """
        return self._requests(op, token=tenant.token, **arguments)

    @property
    def may_wait(self) -> bool:
        """Whether this thread may wait for an answer: it neither hears it nor is in the middle of a request."""
        return threading.current_thread() is not self._thread and not self._requests.is_busy_here

    def ping(self) -> Future[Any]:
        """Ask for an answer: then a worker runs; raises as `request`."""
        return self._requests("ping", token=None)

    def statistics(self, tenant: Tenant | None = None) -> Statistics:
        """Read the counters: shared memory, no round trip. Without a tenant, those of all that have no slot."""
        return self.journal.counters.snapshot() if tenant is None else tenant.statistics(self.journal)

    @property
    def journal(self) -> Journal:
        """What the pager has counted is in it: shared memory, no round trip. A successor's, once that counts on."""
        assert self._requests.counting is not None
        return self._requests.counting

    @property
    def pids(self) -> tuple[int, int]:
        """Keeper and worker, as far as known; the worker of a dead keeper as long as no other one is."""
        return (self._requests.pair.keeper_pid if self._requests.pair is not None else 0, self._worker_pid)

    def lose(self) -> None:
        """Have the owners of the memory settle it now, where the pager was given up. From any thread."""
        if self._dead is not None and self._on_lost is not None:
            self._on_lost()

    def refuse(self, tenant: Tenant) -> None:
        """Have nothing more brought to a tenant, which its owner settles next: a touch until then is SIGBUS."""
        with contextlib.suppress(UffdError, TimeoutError):
            self._ask_last("refuse", tenant)

    def _ask_last(self, op: str, tenant: Tenant, **arguments: Any) -> None:
        future = self.request(op, tenant, **arguments)
        try:
            future.result(0.0 if tenant.silent else LAST_REQUEST)
            self._silent = False
        except TimeoutError:
            tenant.silent = self._silent = not future.done()
            raise

    def settles(self, tenant: Tenant) -> None:
        """Have a tenant not opened anew any more: its owner settles it next, and closes its descriptor."""
        with self._requests.lock:
            tenant.leaving = True
            opening = [request.future for request in self._requests_of(tenant) if request.message["op"] == "open"]
        with contextlib.suppress(UffdError, TimeoutError):
            for future in opening:
                future.result(LAST_REQUEST)

    def close(self, tenant: Tenant) -> None:
        """Have a tenant served no longer, which its owner has settled; forked children are served on."""
        try:
            with self._requests.lock:
                self._requests.fail(self._requests_of(tenant), ClosedError(_LEFT))
            self._ask_last("close", tenant, poison=False)
        except (UffdError, TimeoutError):
            if self._dead is not None:  # its keeper poisons what is touched, and must let go of this
                with self._requests.lock:
                    self._requests.send(Request({"op": "close", "id": 0, "token": tenant.token}))
        self.forget(tenant)

    def _requests_of(self, tenant: Tenant) -> list[Request]:
        return [request for request in self._requests.pending if request.message.get("token") == tenant.token]

    def take_slot(self) -> int:
        """Return where to count for a tenant, or for several of one owner, by themselves; 0: there is no room."""
        return self.slots.take(self.journal)

    @property
    def is_usable(self) -> bool:
        """Whether another tenant may come."""
        return self._dead is None and not self._silent and not self._waiter.stopped and bool(self.slots)

    @property
    def tenants(self) -> list[Tenant]:
        """All that are served."""
        with self._requests.lock:
            return list(self._tenants.values())

    def linger(self, seconds: float, then: Callable[[], None]) -> None:
        """Have `then` called from the client's thread after a while, or when the keeper ends."""
        self._later.plan(seconds, then)
        self._waiter.wake()

    def stop(self, *, leave: bool = False, wait: bool = True) -> None:
        """End the client's side, and the pager's processes with it where they have nothing left to serve.

        Args:
            leave: the pager goes on until all tenants are gone.
            wait: until its processes have ended; else until they have let go of all that they held.
        """
        self._waiter.stop()
        self._requests.close(ClosedError(_LEFT))
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(10.0)
        pairs = [*self._takeover.orphans, *([self._requests.pair] if self._requests.pair is not None else [])]
        states = filter(None, (survey(pair.journal) for pair in pairs))
        leave = leave or any(space.is_child for state in states for space in state.spaces.values())
        self._takeover.close(kill=not leave)
        if self._requests.pair is not None:
            self._requests.pair.end(leave=leave, silent=self._silent, wait=wait)
        self._waiter.close()

    def _open(
        self, tenant: Tenant, mappings: Mappings, counts: list[int] | None, *, again: bool = False
    ) -> Future[Any]:
        pidfd = OwnedDescriptor(open_pidfd(os.getpid()))
        try:
            future = self._requests(
                "open",
                [pidfd.fileno(), *tenant.pack.fds, *tenant.fds],
                token=tenant.token,
                service={**tenant.pack.record, "slot": tenant.slot, "user": self.slots.user(tenant.slot)},
                counts=counts,
                space=tenant.record(mappings),
                own=len(tenant.fds),
                again=again,
            )
        except BaseException:
            pidfd.close()
            raise
        future.add_done_callback(lambda _: pidfd.close())
        return future

    # The thread's side

    def _run(self) -> None:
        try:
            self._serve()
        except StoppedError:
            return
        except BaseException as error:  # noqa: BLE001 - whatever it is, who waits for a page must be let go
            if self._waiter.stopped:  # nothing can be asked for any more, a takeover neither
                return
            self._give_up(error if isinstance(error, UffdError) else PagerDiedError(f"the client failed: {error!r}"))
            self._abandon()
            self._later.run()  # nobody is served: who waits for another user may end it now

    def _serve(self) -> None:
        """Listen to the pager, and replace it when its keeper ends, until the client is stopped."""
        while True:
            assert self._requests.pair is not None
            self._listen(self._requests.pair)
            if not self._waiter.stopped:
                self._later.run()  # nobody is served: no other pager is needed
            if self._waiter.stopped:
                return
            if self._dead is not None:  # the keeper has poisoned what was touched, until now
                self._abandon()
                return
            self._replace(self._requests.pair)

    def _listen(self, pair: Pair) -> None:
        """Handle messages until the keeper ends and nobody makes another, or the client is stopped."""
        hears = True
        while not self._waiter.stopped:
            if not pair.worker_pid:
                self._waiter.watch.alive()
            ready = _ready(pair, self._waiter, self._patience(pair), hears=hears)
            events = ready.get(pair.connection.fileno(), 0) if hears else 0
            if not events:  # a message looks by itself, and what it finds is said below
                self._waiter.check(*pair.descriptors)
            if not self._later.patience:
                self._later.run()
                continue
            self._takeover.continue_if_due()
            told = pair.channel is not None and pair.channel.fileno() in ready
            if told:
                self.holding.hear(pair)
            if self._waiter.fileno() in ready:
                self._waiter.drain()
            if events and not self._exchange(pair, events):
                self._waiter.check(*pair.descriptors)
                hears = False
            # Where nobody holds the other end, the pager has ended by itself, and its holder makes no keeper any more.
            if events or told or pair.guard is pair.keeper_fd or (hears and pair.guard is not None):
                continue
            # A keeper or holder that was made just before, by one that was killed, is about to be told.
            if pair.guard is not None or pair.channel is None or not self._waiter.wait(_TOLD, pair.channel.fileno()):
                return

    def _patience(self, pair: Pair) -> float:
        """Return for how many milliseconds to wait for messages."""
        beat = math.inf if pair.worker_pid else self._waiter.watch.beat
        return min(beat, self._takeover.patience, self._later.patience, LOOK) * 1000 + 1

    def _exchange(self, pair: Pair, events: int) -> bool:
        """Send and receive what is possible now; tell whether the connection is there still."""
        try:
            if events & select.POLLOUT:
                self._requests.flush(pair)
            if events & ~select.POLLOUT and (received := _received(pair)) is not None:
                self._handle(*received)
        except control.Closed:
            return False
        except (HandoffError, ValueError) as error:
            # The worker's memory cannot be trusted any more, or an answer is lost: the keeper starts another worker,
            # which is asked again.
            log.error("the pager's worker (pid %d) is killed and replaced: %s", pair.worker_pid, error)  # noqa: TRY400
            pair.kill_worker()
        except Exception:
            log.exception("a message of the pager could not be handled")
        return True

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        if message.get("event") == "ready":
            assert self._requests.pair is not None
            self._worker_pid = message["pid"]
            with self._requests.lock:
                self._requests.pair.runs(self._worker_pid, fds[0] if fds else -1)
                if message["again"]:  # a worker before it has died, with what it had read
                    self._requests.resend()
                self._waiter.watch.over(*self._ends)
        elif "event" in message:
            self._event(message)
        else:
            self._requests.answer(message)

    @property
    def _ends(self) -> tuple[int, ...]:
        """What tells of the end of those that serve; nothing while that is not known."""
        pair = self._requests.pair
        ends = (pair.keeper_fd, pair.worker_fd) if pair is not None else ()
        return tuple(end.fileno() for end in ends) if all(end.intact for end in ends) else ()

    def _event(self, message: dict[str, Any]) -> None:
        event, tenant = message["event"], self._tenants.get(root_of(message.get("token", "")))
        if event == "gone" and tenant is not None:
            self._on_gone(tenant)
        elif event == "error" and tenant is not None:
            self._on_error(tenant, self._requests.error(message.get("error")))
        elif event == "flight" and tenant is not None:
            self._on_flight(tenant, message)
        elif event == "protect" and tenant is not None and tenant.protect is not None:
            tenant.protect(message["start"], message["length"])
            self.request("protected", tenant, start=message["start"])
        elif event == "failing":  # the worker, which is replaced; where all fail, this says why
            self._reason = self._requests.error(message.get("error"))
        elif event == "died":
            self._give_up(_with_reason(self._requests.error(message.get("error")), self._reason))
            if self._on_lost is not None and Feature.POISON not in kernel_features():  # the keeper poisons nothing
                self._on_lost()

    def _give_up(self, error: BaseException) -> None:
        self._waiter.watch.close()
        self._dead = error
        self._requests.close(error)
        self._on_error(None, error)

    def _abandon(self) -> None:
        pair = self._requests.pair
        state = survey(pair.journal) if pair is not None else None
        fds = pair.vault.take() if pair is not None else {}
        children = [child for tenant in list(self._tenants.values()) for child in tenant.children(state, fds)]
        poison_what_is_touched(self._tenants, state, self._waiter, self._on_lost, children)

    # A keeper has died

    def _replace(self, pair: Pair) -> None:
        """Give what the worker without a keeper serves to a new pair.

        While nobody reads, touches wait: this process holds a duplicate of the descriptor.
        """
        self._waiter.check(*(each for tenant in self.tenants for each in tenant.descriptors))
        self._waiter.watch.alive()
        self.holding.outcome(pair)
        status = pair.keeper.wait()
        self._progress += pair.journal.progress()  # of this pair alone, whatever was opened anew in it
        if self._deaths.add(status, self._progress) and not self._takeover.orphan_lives:  # else somebody serves
            count = self._deaths.count
            raise PagerDiedError(f"{count} pagers died with no fault resolved between them (status {status})")
        log.warning("the pager's keeper (pid %d) died (status %d) and is replaced", pair.keeper_pid, status)
        if self._deaths.pause:
            self._waiter.wait(self._deaths.pause)
        with self._requests.lock:
            self._requests.held = True
        successor = self._takeover.successor(pair)
        with self._requests.lock:
            self._requests.pair = successor
        self._takeover.begin()
