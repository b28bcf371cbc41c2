"""The engine that a server runs: `aiouffd serve` serves the region, over the connection that handed it over."""

from __future__ import annotations

import itertools
import logging
import os
import select
import socket
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

from aiouffd.engine.statistics import Statistics
from aiouffd.errors import AccessError, ClosedError, HandoffError, PagerDiedError, PagerStartError, decode_error
from aiouffd.handoff.firecracker import encode
from aiouffd.handoff.lines import VERSION, Lines, line
from aiouffd.native.watchdog import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.mappings import Mapping
    from aiouffd.kernel.userfaultfd import Userfaultfd

__all__ = ["ServerEngine"]

log = logging.getLogger("aiouffd")

_TIMEOUT: Final = 30.0


class ServerEngine:
    """A region that a server serves (`aiouffd serve`). Thread-safe; blocks until it is served.

    Args:
        path: of the server's socket.
        uffd: the region's; stays the caller's.
        mapping: where the region lies, and which offsets of the server's source it shows.
        page_size: of the region.
        name: what is asked for, where the server has several sources.
        on_error: called from another thread with each error that the server reports.
        on_lost: called from there when nobody serves the region any more.
        stuck_limit: seconds until the process is ended when that happens while a thread waits for a page with the GIL
            held; None: never.

    Raises:
        PagerStartError: there is no server, or it does not serve this; its reason is said.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        uffd: Userfaultfd,
        mapping: Mapping,
        page_size: int,
        *,
        name: str = "",
        on_error: Callable[[BaseException], None],
        on_lost: Callable[[], None],
        stuck_limit: float | None = None,
    ) -> None:
        self._path = os.fspath(path)
        self._on_error = on_error
        self._on_lost = on_lost
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        taken: Future[Any] = Future()
        self._pending: dict[int, Future[Any]] = {0: taken}
        self._closing = False
        self._gone = False  # the server; its pager may serve on
        self._served = False
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._tether, tether = os.pipe2(os.O_CLOEXEC)
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._run, name="aiouffd-link", daemon=True)
        self._watch = Watch(uffd.fileno(), stuck_limit)
        try:
            self._connection.connect(self._path)
            extra = {"version": VERSION, "name": name}
            socket.send_fds(self._connection, [encode([mapping], page_size, extra)], [uffd.fileno(), tether])
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

    pids = ()

    def prefetch(self, offset: int, length: int) -> Future[Any]:
        """Bring offsets [offset, offset + length)."""
        return self._request("prefetch", offset=offset, length=length)

    def statistics(self) -> Statistics:
        """Return what the server has counted, for all its clients."""
        return Statistics(**self._request("statistics").result(_TIMEOUT))

    def refuse(self) -> None:
        """Bring nothing more: whoever waits or touches gets SIGBUS, until the memory is settled and this is closed."""
        self._ask("refuse")

    def close(self) -> None:
        """Serve no longer. Settle the memory first: who touches it later would hang."""
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
