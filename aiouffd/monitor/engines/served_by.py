"""The engine that a server runs: `ServedBy`."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs

from aiouffd.engine.options import Options
from aiouffd.engine.statistics import Statistics
from aiouffd.errors import (
    AccessError,
    ClosedError,
    HandoffError,
    PagerDiedError,
    PagerError,
    PagerStartError,
    UffdError,
)
from aiouffd.handoff.firecracker import encode
from aiouffd.handoff.json_lines import AGAIN, MOST_RANGES, VERSION, Lines, line
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.owned_descriptor import OwnedDescriptor, OwnedSocket
from aiouffd.kernel.sockets import connect_within, send_within
from aiouffd.lifetime import close_in_children
from aiouffd.monitor.engines.protocol import positive_or_none
from aiouffd.native.watchdog import Watch
from aiouffd.pager.client.waiting import LOOK, Waiter, Watches
from aiouffd.ranges import batched
from aiouffd.rpc import LAST_REQUEST, Requests, all_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from aiouffd.monitor.engines.protocol import Assignment, Terms
    from aiouffd.rpc import Request
    from aiouffd.store.live import Order

__all__ = ["ServedBy", "ServedByEngine"]

log: logging.Logger = logging.getLogger("aiouffd")

_TIMEOUT: Final = 30.0


@attrs.frozen
class ServedBy:
    """`aiouffd serve` serves the region, from its own source; no process is started.

    What a source or a pager is asked for (timeout, retries, readahead, record, replay, background) is the server's to
    say. `Monitor.statistics` counts for all clients of the server.

    Args:
        path: of the server's socket.
        source: which of the server's sources, where it has several (`--source-for`); else it refuses a name.
        stuck_limit: seconds until this process is ended (SIGABRT) if all that serve have ended while a thread waits for
            a page with the GIL held. It needs the native part. None: never.
    """

    path: str = attrs.field(converter=os.fspath)
    source: str = ""
    stuck_limit: float | None = attrs.field(default=5.0, validator=positive_or_none)

    features: ClassVar[Feature] = Feature.THREAD_ID | abi.LAYOUT_EVENTS
    serves_system_calls: ClassVar[bool] = True
    serves_children: ClassVar[bool] = False  # if the server is killed, nobody else has their descriptors: zeros
    counts_here: ClassVar[bool] = False
    loop_is_here: ClassVar[bool] = False
    needs_loop: ClassVar[bool] = False

    def drops_private(self, **_: object) -> bool:
        """Never: it is another process."""
        return False

    def check(self, terms: Terms) -> None:
        """Refuse what only the server can be asked for."""
        given = Options(modes=terms.options.modes, write_protect=terms.options.write_protect)
        refused = [
            name
            for name, is_asked in {
                "source or handler": terms.origin is not None,
                "record": terms.records,
                "replay": terms.replays,
                "report (its statistics are those of all its clients)": terms.reports,
                "background": bool(terms.options.background),
                "readahead": terms.options.readahead != given.readahead and not terms.records,
                "on_error": terms.options.on_error != given.on_error,
                "max_resident or write_back": terms.options.bounded,
                "timeout, retries, concurrent_reads or bytes_in_flight": terms.options.limits != given.limits,
            }.items()
            if is_asked
        ]
        if refused:
            raise ValueError(f"engine=ServedBy() takes no {', '.join(refused)}: these are the server's to choose")

    def make(self, _loop: asyncio.AbstractEventLoop | None) -> ServedByEngine:
        """Return an engine."""
        return ServedByEngine(self)


class ServedByEngine:
    """A region that a server serves. `start` blocks until it is served.

    Raises (on start):
        PagerStartError: there is no server, or it does not serve this region; its reason is given.
    """

    layout = None
    pids: tuple[int, ...] = ()

    def __init__(self, choice: ServedBy) -> None:
        self._path = choice.path
        self._name = choice.source
        self._stuck_limit = choice.stuck_limit
        self._on_error: Callable[[BaseException], None]
        self._on_lost: Callable[[], None]
        self._requests = Requests(f"the server at {self._path}", self._send, first=0)
        self._closing = False
        self._silent = False  # it did not answer what was asked on leaving
        self._served = False
        self._waiter: Waiter
        self._tether: OwnedDescriptor
        self._connection: OwnedSocket
        self._thread: threading.Thread
        self._watch: Watch

    def start(self, assignment: Assignment) -> None:
        """Hand the region over to the server."""
        self._on_error, self._on_lost = assignment.on_error, assignment.on_lost
        taken = self._requests.expect("serve").future  # the handoff is this request
        self._waiter = Waiter(Watches())
        self._tether, tether = map(OwnedDescriptor, os.pipe2(os.O_CLOEXEC))
        self._connection = OwnedSocket(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        close_in_children(self._connection)
        self._thread = threading.Thread(target=self._run, name="aiouffd-link", daemon=True)
        self._watch = Watch(assignment.uffd.fileno(), self._stuck_limit)
        try:
            # connect(2) waits, where clients that nobody has taken fill the queue of a server that is stopped, or held.
            connect_within(self._connection, self._path, _TIMEOUT)
            tracked = assignment.options.write_protect
            extra = {"version": VERSION, "name": self._name, "write_protect": tracked}
            message = encode([assignment.mapping], assignment.page_size, extra)
            socket.send_fds(self._connection, [message], [assignment.uffd.fileno(), tether.fileno()])
            send_within(self._connection, 0)
            tether.close()
            self._thread.start()
            taken.result(_TIMEOUT)
            self._watch.over(self._tether.fileno())
        except PermissionError as error:
            self._end()
            raise AccessError(self._path, "the server lets in its own user, and those of --allow-uid") from error
        except (TimeoutError, BlockingIOError) as error:
            self._end()
            raise PagerStartError(f"{self._path}: the server did not answer within {_TIMEOUT:g} s") from error
        except OSError as error:
            self._end()
            raise PagerStartError(f"{self._path}: {error.strerror}; is `aiouffd serve` running there?") from error
        except BaseException:
            self._end()
            raise
        finally:
            tether.close()

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> Future[Any]:
        """Bring (offset, length) ranges."""
        return all_of([self._requests("prefetch", ranges=part) for part in batched(ranges, MOST_RANGES)])

    def evict(self, offset: int, length: int) -> Future[int]:
        """Raise: `ServedBy.check` has refused what this needs."""
        raise NotImplementedError

    def flush(self, offset: int, length: int) -> Future[None]:
        """As `evict`."""
        raise NotImplementedError

    def snapshot(self, order: Order) -> Future[dict[str, Any]]:
        """Raise: a server writes nothing where a client says."""
        raise ValueError(
            f"engine=ServedBy() takes no snapshots, and {order.destination!r} would be the server's to write"
        )

    def cancel_snapshot(self) -> None:
        """Do nothing: there is none."""

    def check_may_wait(self) -> None:
        """Do nothing: the loop runs in another process."""

    def statistics(self) -> Statistics:
        """Return what the server has counted, for all its clients.

        Raises:
            PagerError: it does not answer.
        """
        try:
            answer = self._requests("statistics").result(0.0 if self._silent else _TIMEOUT)
        except TimeoutError:
            self._silent = True
            raise PagerError(f"the server at {self._path} does not answer: see its log") from None
        try:
            return Statistics(**answer)
        except TypeError as error:
            raise HandoffError(f"the server at {self._path}", f"sent {answer!r:.80} as its statistics") from error

    def give_up(self, offset: int, length: int) -> None:
        """Do nothing: what fails is what the server has decided."""

    def refuse(self) -> None:
        """Bring nothing more: a touch of a missing page is SIGBUS until `leave`."""
        self._ask("refuse")

    def leave(self, settle: Callable[[], None], *, sigbus: bool) -> None:
        """Serve no longer. The memory is settled first: a touch that nobody answers would hang."""
        try:
            settle()
        finally:
            if not self._closing:
                self._served = False
                self._ask("close", poison=False)
            self._end()

    def _ask(self, op: str, **arguments: Any) -> None:
        if self._silent:
            return
        try:
            self._requests(op, **arguments).result(LAST_REQUEST)
        except TimeoutError:
            self._silent = True
            log.warning("the server at %s does not answer: left without it", self._path)
        except (ClosedError, HandoffError, PagerError):
            log.debug("the server has gone first")

    def _send(self, request: Request) -> None:
        try:
            self._connection.sendall(line(request.message))
        except OSError as error:
            raise ClosedError(f"the server at {self._path} has gone: {error.strerror}") from error

    def _run(self) -> None:
        lines = Lines()
        poller = select.poll()
        poller.register(self._connection.fileno(), select.POLLIN)
        poller.register(self._waiter, select.POLLIN)
        poller.register(self._tether, 0)  # POLLHUP
        while True:
            ready = {fd for fd, _ in poller.poll(LOOK * 1000)}
            if self._closing:
                return
            try:
                self._waiter.check(self._connection, self._tether)
            except PagerError as error:
                self._requests.close(error)
                self._lose(error)
                return
            if self._connection.fileno() in ready:
                try:
                    self._receive(lines)
                except UffdError as error:
                    # Nothing can be asked any more; the server's pager may serve on.
                    poller.unregister(self._connection)
                    self._requests.close(error)
                    with contextlib.suppress(OSError):
                        self._connection.shutdown(socket.SHUT_RDWR)
            elif self._tether.fileno() in ready:
                poller.unregister(self._tether)
                if not self._served:  # turned away, or left: the answer tells
                    continue
                self._lose(PagerDiedError(f"the server at {self._path} and its pager have ended"))

    def _lose(self, error: PagerError) -> None:
        self._watch.close()
        self._on_lost()  # first, so that whoever is told finds the region settled
        self._on_error(error)

    def _receive(self, lines: Lines) -> None:
        """Handle what has come; UffdError when nothing will come any more, or it cannot be understood."""
        try:
            data = self._connection.recv(64 << 10)
        except OSError as error:
            raise ClosedError(f"the server at {self._path} has gone: {error.strerror}") from error
        if not data:
            raise ClosedError(f"the server at {self._path} has gone")
        try:
            for message in lines.feed(data):
                self._handle(message)
        except ValueError as error:
            raise HandoffError(f"the server at {self._path}", f"cannot be understood: {error}") from error

    def _handle(self, message: dict[str, Any]) -> None:
        if "id" not in message:  # else it is the memory that other clients map
            if "error" in message:
                self._on_error(self._requests.error(message["error"]))
            return
        if message["id"] == 0 and "ok" in message:  # here, since the server may end before `start` goes on
            self._served = True
            if isinstance(message["ok"], dict) and AGAIN in message["ok"]:
                self._ask_again()
        self._requests.answer(message)

    def _ask_again(self) -> None:
        """Another process answers from now on."""
        with self._requests.lock, contextlib.suppress(OSError):  # it has gone: that is noticed elsewhere
            self._connection.sendall(line({"op": AGAIN}))
            for request in self._requests.pending:
                self._connection.sendall(line(request.message))

    def _end(self) -> None:
        self._closing = True
        self._requests.close(ClosedError("the Monitor has been left"))
        self._waiter.stop()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(10.0)
        self._watch.close()
        self._connection.close()
        self._waiter.close()
        self._tether.close()
