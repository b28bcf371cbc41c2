"""The engine that a server runs: `ServedBy`."""

from __future__ import annotations

import itertools
import logging
import os
import select
import socket
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs

from aiouffd.engine.assembly import Options
from aiouffd.engine.statistics import Statistics
from aiouffd.errors import AccessError, ClosedError, HandoffError, PagerDiedError, PagerStartError, decode_error
from aiouffd.handoff.firecracker import encode
from aiouffd.handoff.lines import VERSION, Lines, line
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature
from aiouffd.monitor.engines.protocol import positive_or_none
from aiouffd.native.watchdog import Watch

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aiouffd.monitor.engines.protocol import Assignment, Terms

__all__ = ["ServedBy", "ServedByEngine"]

log = logging.getLogger("aiouffd")

_TIMEOUT: Final = 30.0


@attrs.frozen
class ServedBy:
    """`aiouffd serve` serves the region, from its own source; no process is started.

    What a source or a pager is asked for (timeout, retries, readahead, record, replay, background) is the server's to
    say. `Monitor.statistics` counts for all clients of the server.

    Args:
        path: of the server's socket.
        source: which of the server's sources, where it has several.
        stuck_limit: seconds until this process is ended (SIGABRT) if all that serve have ended while a thread waits for
            a page with the GIL held. It needs the native part. None: never.
    """

    path: str = attrs.field(converter=os.fspath)
    source: str = ""
    stuck_limit: float | None = attrs.field(default=5.0, validator=positive_or_none)

    features: ClassVar[Feature] = Feature.THREAD_ID | abi.LAYOUT_EVENTS
    serves_system_calls: ClassVar[bool] = True

    def check(self, terms: Terms) -> None:
        """Refuse what only the server can be asked for."""
        given = Options(modes=terms.options.modes, write_protect=terms.options.write_protect)
        refused = [
            name
            for name, is_asked in {
                "a source or handler": terms.origin is not None,
                "record": terms.records,
                "replay": terms.replays,
                "background": bool(terms.options.background),
                "readahead": terms.options.readahead != given.readahead and not terms.records,
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
    pids = ()

    def __init__(self, choice: ServedBy) -> None:
        self._path = choice.path
        self._name = choice.source
        self._stuck_limit = choice.stuck_limit
        self._on_error: Callable[[BaseException], None]
        self._on_lost: Callable[[], None]
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Any]] = {}
        self._closing = False
        self._gone = False  # the server; its pager may serve on
        self._served = False
        self._wake_r = self._wake_w = self._tether = -1
        self._connection: socket.socket
        self._thread: threading.Thread
        self._watch: Watch

    def start(self, assignment: Assignment) -> None:
        """Hand the region over to the server."""
        self._on_error, self._on_lost = assignment.on_error, assignment.on_lost
        taken = self._pending[0] = Future()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._tether, tether = os.pipe2(os.O_CLOEXEC)
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._run, name="aiouffd-link", daemon=True)
        self._watch = Watch(assignment.uffd.fileno(), self._stuck_limit)
        try:
            self._connection.connect(self._path)
            extra = {"version": VERSION, "name": self._name}
            message = encode([assignment.mapping], assignment.page_size, extra)
            socket.send_fds(self._connection, [message], [assignment.uffd.fileno(), tether])
            os.close(tether)
            tether = -1
            self._thread.start()
            taken.result(_TIMEOUT)
            self._watch.over(self._tether)
        except PermissionError as error:
            self._end()
            raise AccessError(self._path, "the server lets in its own user, and those of --allow-uid") from error
        except TimeoutError as error:
            self._end()
            raise PagerStartError(f"{self._path}: the server did not answer within {_TIMEOUT:g} s") from error
        except OSError as error:
            self._end()
            raise PagerStartError(f"{self._path}: {error.strerror}; is `aiouffd serve` running there?") from error
        except BaseException:
            self._end()
            raise
        finally:
            if tether >= 0:
                os.close(tether)

    def prefetch(self, offset: int, length: int) -> Future[Any]:
        """Bring offsets [offset, offset + length)."""
        return self._request("prefetch", offset=offset, length=length)

    def check_may_wait(self) -> None:
        """Do nothing: the loop runs in another process."""

    def statistics(self) -> Statistics:
        """Return what the server has counted, for all its clients."""
        return Statistics(**self._request("statistics").result(_TIMEOUT))

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
        try:
            self._request(op, **arguments).result(_TIMEOUT)
        except (ClosedError, TimeoutError, HandoffError, PagerDiedError):
            log.debug("the server has gone first")

    def _request(self, op: str, **arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._gone or self._closing:
                raise ClosedError(f"the server at {self._path} has gone")
            number = next(self._numbers)
            self._pending[number] = future
            try:
                self._connection.sendall(line({"id": number, "op": op, **arguments}))
            except OSError as error:
                del self._pending[number]
                raise ClosedError(f"the server at {self._path} has gone: {error.strerror}") from error
        return future

    def _run(self) -> None:
        lines = Lines()
        poller = select.poll()
        poller.register(self._connection.fileno(), select.POLLIN)
        poller.register(self._wake_r, select.POLLIN)
        poller.register(self._tether, 0)  # POLLHUP
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._closing:
                return
            if self._connection.fileno() in ready:
                try:
                    data = self._connection.recv(64 << 10)
                    for message in lines.feed(data):
                        self._handle(message)
                    reason = "has ended"
                except (OSError, ValueError) as error:
                    data, reason = b"", f"cannot be understood: {error}"
                if not data:
                    poller.unregister(self._connection)
                    self._fail(ClosedError(f"the server at {self._path} {reason}"))
            elif self._tether in ready:
                poller.unregister(self._tether)
                if not self._served:  # turned away, or left: the answer tells
                    continue
                self._watch.close()
                self._on_lost()  # first, so that whoever is told finds the region settled
                self._on_error(PagerDiedError(f"the server at {self._path} and its pager have ended"))

    def _fail(self, error: ClosedError) -> None:
        """Nothing can be asked for any more."""
        with self._lock:
            self._gone = True
            pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_exception(error)

    def _handle(self, message: dict[str, Any]) -> None:
        if "id" not in message:
            self._on_error(decode_error(message["error"]))
            return
        future = self._pending.pop(message["id"], None)
        if future is None:
            return
        if "error" in message:
            future.set_exception(decode_error(message["error"]))
        else:
            if message["id"] == 0:  # here, since the server may end before whoever waits for this has run
                self._served = True
            future.set_result(message.get("ok"))

    def _end(self) -> None:
        with self._lock:
            self._closing = True
            pending, self._pending = self._pending, {}
        os.write(self._wake_w, b"x")
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(10.0)
        self._watch.close()
        for future in pending.values():
            if not future.done():
                future.set_exception(ClosedError("the Monitor has been left"))
        self._connection.close()
        for fd in (self._wake_r, self._wake_w, self._tether):
            os.close(fd)
