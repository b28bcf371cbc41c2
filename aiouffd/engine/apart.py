"""Calls on a stranger's file, in a thread of their own: they may never return.

fallocate(2), and lseek(2) for data and holes, wait for the lock of the file's inode, and nothing interrupts that. Who
may write to the file can hold this lock for as long as he likes, by a write(2) from memory that he leaves missing.
"""

from __future__ import annotations

import asyncio
import threading
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiouffd.kernel import files

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.lifetime import Closable

__all__ = ["Apart", "StuckError", "at_once"]

T = TypeVar("T")


_SOON: Final = 0.002  # seconds: most calls return within that, and the loop waits for them
_GLANCE: Final = 0.005


class StuckError(Exception):
    """A call has not returned: somebody holds the lock of the file."""


class _Call:
    """A call, and what becomes of it."""

    def __init__(self, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self.function, self.then = function, then
        self.outcome: Any = None
        self.returned = threading.Event()
        self._lock = threading.Lock()
        self._late: Callable[[], None] | None = None

    def run(self) -> None:
        """Call, in the thread; what is raised is the outcome."""
        try:
            self.outcome = self.function()
        except Exception as error:  # noqa: BLE001 - it is raised where the outcome is looked at
            self.outcome = error
        with self._lock:
            self.returned.set()
            late = self._late
        if late is not None:
            late()

    def is_late(self, later: Callable[[], None]) -> bool:
        """Tell whether it has not returned soon; then `later` is called, in the thread, when it has."""
        if self.returned.wait(_SOON):
            return False
        with self._lock:
            if not self.returned.is_set():
                self._late = later
            return not self.returned.is_set()

    def finish(self) -> None:
        """Have what follows done, on the loop."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        self.then(self.outcome)


class Apart:
    """Calls on one file, one at a time. Used on one loop.

    Args:
        on_waiting: called with True when a call takes longer than a moment, and with False when it has returned.
        on_stuck: called when it has not returned for long. It may still.
        patience: seconds until then; None: never.

    Attributes:
        is_waiting: a call has not returned: there may be no other.

    Raises:
        RuntimeError: no thread can be started.
    """

    def __init__(
        self, on_waiting: Callable[[bool], None], on_stuck: Callable[[], None], patience: float | None
    ) -> None:
        self.is_waiting: bool = False
        self._on_waiting, self._on_stuck, self._patience = on_waiting, on_stuck, patience
        self._timer: asyncio.TimerHandle | None = None
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._calls,), name="aiouffd-apart", daemon=True).start()

    def call(self, function: Callable[[], T], then: Callable[[T], None]) -> bool:
        """Have a function called in the thread, and `then` with what it returns here; tell whether that is done.

        What the function raises is raised here, or goes to the loop's exception handler.
        """
        return self.begin(function, then)()

    def begin(self, function: Callable[[], T], then: Callable[[T], None]) -> Callable[[], bool]:
        """Begin what `call` does; return what the loop must call before it goes on."""
        assert not self.is_waiting
        loop, call = asyncio.get_running_loop(), _Call(function, then)
        self._calls.put(call)

        def finish() -> bool:
            if not call.is_late(lambda: _soon(loop, self._finish, call)):
                call.finish()
                return True
            self.is_waiting = True
            if self._patience is not None:
                self._timer = loop.call_later(self._patience, self._on_stuck)
            self._on_waiting(True)
            return False

        return finish

    def _finish(self, call: _Call) -> None:
        self.is_waiting = False
        self._unplan()
        try:
            call.finish()
        finally:
            if not self.is_waiting:  # else another call was made just now
                self._on_waiting(False)

    def close(self, file: Closable) -> None:
        """Call nothing more, and close the file: in the thread, for a large one takes long to be freed."""
        self._unplan()
        self._calls.put(_Call(file.close, lambda _: None))
        self._calls.put(None)

    def _unplan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _work(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()


def _soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)


def at_once(function: Callable[[], T], patience: float) -> T:
    """Return what a function returns. Blocks; it is called in a thread, which may be lost.

    Raises:
        StuckError: it has waited for a lock for `patience` seconds, and does still.
        Exception: whatever the function raises.
    """
    call = _Call(function, lambda _: None)
    thread = threading.Thread(target=call.run, name="aiouffd-apart", daemon=True)
    thread.start()
    until = monotonic() + patience
    while not call.returned.wait(_GLANCE):
        if not _waits(thread.native_id):  # it is at work
            until = monotonic() + patience
        elif monotonic() > until:
            raise StuckError
    call.finish()
    found: T = call.outcome
    return found


def _waits(thread: int | None) -> bool:
    try:
        return files.read(f"/proc/self/task/{thread}/stat").rpartition(b")")[2].split()[0] == b"D"
    except OSError:  # it has ended just now, or there is no /proc
        return False
