"""Pagers that several Monitors use: started by the first of them, and ended with the last, or `linger` seconds later.

A pager serves only where this process is as it was when the pager was started (`place`): what it may open and reach is
what the process could then. A forked child starts its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from aiouffd.pager.client.forks import await_readers
from aiouffd.pager.client.launch import Launched

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from aiouffd.pager.client.client import PagerClient
    from aiouffd.pager.client.tenant import Tenant
    from aiouffd.pager.process.serialization import Pickles

__all__ = ["Pagers", "before_fork", "place"]

_NAMESPACES = "/proc/thread-self/ns"
_loading = threading.RLock()  # a fork waits for it: a child could never import what another thread is importing
_inherited: list[Any] = []  # what a forked child has of its parent's: to free it would be to warn of a lost process


def place() -> Hashable:
    """Return what decides what a process may open and reach, and how its sources find their way. No I/O."""
    namespaces, directories = [], []
    with contextlib.suppress(OSError):  # there is no /proc
        namespaces = [os.readlink(f"{_NAMESPACES}/{name}") for name in sorted(os.listdir(_NAMESPACES))]  # noqa: PTH115, PTH208 - names
        directories = [os.readlink("/proc/thread-self/root")]  # noqa: PTH115 - it may be outside of any path
    with contextlib.suppress(OSError):  # it was removed
        directories.append(os.getcwd())  # noqa: PTH109 - as above
    return (
        os.getpid(),
        os.getresuid(),
        os.getresgid(),
        frozenset(os.getgroups()),
        tuple(namespaces),
        tuple(directories),
        frozenset(os.environ.items()),
    )


def _told(tenant: Tenant, message: dict[str, Any]) -> None:
    if tenant.flight is not None:
        tenant.flight(message)


class Pagers:
    """The pagers that some Monitors share: one for each `key`. Thread-safe.

    Args:
        pickles: how often such a pager unpickles a source or handler.
        key: called where a pager is taken; it is another one where a pager that runs may not serve.
        linger: seconds that a pager waits for another user.
    """

    def __init__(self, pickles: Pickles, key: Callable[[], Hashable] = os.getpid, *, linger: float = 0.0) -> None:
        self._pickles = pickles
        self._key = key
        self._linger = linger
        self._lock = threading.RLock()  # a finalizer may leave a Monitor, wherever its thread is
        self._current: dict[Hashable, PagerClient] = {}
        self._users: Counter[PagerClient] = Counter()
        _all.add(self)

    def take(self) -> PagerClient:
        """Return a pager that runs; `give_back` it. Blocks for about a tenth of a second where none runs yet.

        Raises:
            PagerStartError: it did not start.
        """
        with contextlib.ExitStack() as unlocked, self._lock:
            key = self._key()
            client = self._current.get(key)
            if client is None or not client.is_usable:
                if client is not None and not self._users[client]:
                    self._drop(client)
                    unlocked.callback(client.stop)  # its thread may wait for the lock, to end it as well
                client = self._current[key] = self._start()
            self._users[client] += 1
        return client

    def _start(self) -> PagerClient:
        def report(tenant: Tenant | None, error: BaseException) -> None:
            for one in client.tenants if tenant is None else [tenant]:
                one.report(error)

        def lost() -> None:
            for one in client.tenants:
                one.lost()

        launched = Launched(self._pickles)
        try:
            with _loading:
                from aiouffd.pager.client.client import PagerClient  # noqa: PLC0415 - while the pager's Python starts

            client = PagerClient(on_error=report, on_flight=_told, on_lost=lost, pickles=self._pickles)
        except BaseException:
            launched.abandon()
            raise
        try:
            client.start(launched)
        except BaseException:
            client.stop()
            raise
        return client

    def give_back(self, client: PagerClient) -> None:
        """Use a pager no longer. Blocks until it has ended, where nobody else uses it and it does not linger."""
        with self._lock:
            self._users[client] -= 1
            if self._users[client]:
                return
            if self._linger and client.is_usable and client in self._current.values():
                client.linger(self._linger, partial(self._end, client))
                return
            self._drop(client)
        client.stop()

    def _end(self, client: PagerClient) -> None:
        with self._lock:
            if self._users[client] or client not in self._current.values():
                return
            self._drop(client)
        client.stop()

    def _drop(self, client: PagerClient) -> None:
        del self._users[client]
        self._current = {key: other for key, other in self._current.items() if other is not client}

    def end(self) -> None:
        """End the pagers that nobody uses."""
        for client in list(self._current.values()):
            self._end(client)

    @property
    def used(self) -> list[PagerClient]:
        """The pagers that somebody uses."""
        return [client for client, users in list(self._users.items()) if users]

    def begin_anew(self) -> None:
        """Have no pager: this is a forked child."""
        _inherited.append((self._current, self._users))
        self._lock, self._current, self._users = threading.RLock(), {}, Counter()


_all: weakref.WeakSet[Pagers] = weakref.WeakSet()


def before_fork() -> None:
    """Wait until the pagers of this process read the event of a fork that is about to be made."""
    await_readers([client for pagers in list(_all) for client in pagers.used])


def _in_child() -> None:
    _loading.release()
    for pagers in list(_all):
        pagers.begin_anew()


def _at_exit() -> None:
    for pagers in list(_all):
        pagers.end()
        for client in pagers.used:  # blocks that are not left: munmap waits until the pager has read of it
            client.resume()


os.register_at_fork(before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_in_child)
atexit.register(_at_exit)
