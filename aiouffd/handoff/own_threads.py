"""Blocking calls that may never return, each in a daemon thread of its own.

What a stranger names or sends may lie on a file system that does not answer: open(2), fstat(2), lseek(2) and close(2)
can wait for ever. asyncio.to_thread would be wrong for these: its pool has few threads, so that some calls that
hang would stop everybody's, and the interpreter joins them at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiouffd.kernel.owned_descriptor import OwnedDescriptor

__all__ = ["Unneeded", "close_apart", "close_foreign", "detach", "in_own_thread", "kind_of"]

log: logging.Logger = logging.getLogger("aiouffd.server")

P = ParamSpec("P")
T = TypeVar("T")

_SOON = 0.1  # seconds
_SAFE = ("pipe:[", "anon_inode:[userfaultfd]")
_FEW_BLOCKS = 16 << 11  # 16 MiB of memory are freed within a millisecond or two


async def in_own_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread of its own, and return what it returns.

    Canceling is safe: the thread goes on to the end of the call, whose result is dropped.

    Raises:
        RuntimeError: no thread can be started.
        BaseException: whatever the function raises.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():  # canceled
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function(*args, **kwargs)
        except StopIteration as stopped:  # a future refuses it
            error = RuntimeError(f"raised {stopped!r}")
        except BaseException as raised:  # noqa: BLE001 - it is the caller's
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, result, error)

    detach(run)
    return await future


def close_foreign(fds: Iterable[int]) -> None:
    """Close descriptors that a stranger has sent. Does not block: close(2) that may wait is left to a thread.

    A TCP socket with SO_LINGER waits for its unsent data, a file of FUSE or NFS for its server. So does a Unix socket
    in whose queue such descriptors are.
    """
    slow = []
    for fd in fds:
        if _closes_at_once(fd):
            os.close(fd)
        else:
            slow.append(fd)
    if slow:
        try:
            detach(_close_all, deque(slow))
        except RuntimeError as error:
            log.error("descriptors that stay open: %d (%s)", len(slow), error)  # noqa: TRY400 - no traceback helps here


def close_apart(file: OwnedDescriptor) -> None:
    """Close the memory of a stranger, if it is open. Does not block: to free many pages takes long."""
    if file.closed:
        return
    try:
        (file.close if _closes_at_once(file.fileno()) else partial(detach, file.close))()
    except RuntimeError:  # no thread can be started
        file.close()


class Unneeded:
    """Closes descriptors as `close_foreign` does, but soon and together: a thread for each takes longer than all else.

    One whose close(2) does not return keeps no other open: another thread closes these.

    Args:
        loop: runs this.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._fds: deque[int] = deque()
        self._planned = False

    @classmethod
    def here(cls) -> Unneeded:
        """Return that of the loop that runs. Whoever uses it calls `close` before the loop may end."""
        loop = asyncio.get_running_loop()
        return _of_loops.setdefault(loop, cls(loop))

    def close(self) -> None:
        """Have all of them closed now."""
        if self._fds:
            with contextlib.suppress(RuntimeError):  # no thread can be started now
                detach(_close_all, self._fds)

    def add(self, *fds: int) -> None:
        """Close these, too."""
        self._fds += fds
        if not self._planned:
            self._planned = True
            self._loop.call_later(_SOON, self._close)

    def _close(self) -> None:
        self._planned = False
        if self._fds:
            self.close()
            self.add()  # a look whether it has closed them


def kind_of(fd: int) -> str:
    """Return what a descriptor is of, as /proc says it: `pipe:[1]`, `anon_inode:[userfaultfd]`, or a path."""
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - no path


def _closes_at_once(fd: int) -> bool:
    try:
        if kind_of(fd).startswith(_SAFE):
            return True
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # of memory only: EINVAL for all other files, whatever their names
        return os.fstat(fd).st_blocks <= _FEW_BLOCKS
    except OSError:  # also where there is no /proc
        return False


def _close_all(fds: deque[int]) -> None:
    with contextlib.suppress(IndexError):  # all are closed, or another thread has the last one
        while True:
            fd = fds.popleft()
            with contextlib.suppress(OSError):
                os.close(fd)


def detach(function: Callable[..., Any], *args: Any) -> None:
    """Call a function in a thread of its own, and do not wait for it.

    Raises:
        RuntimeError: no thread can be started.
    """
    threading.Thread(target=function, args=args, name="aiouffd-own-thread", daemon=True).start()


_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Unneeded] = WeakKeyDictionary()
