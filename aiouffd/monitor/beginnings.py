"""A fork() waits while nobody could read of it, though forked children are to be served.

A fork() waits in the kernel, with the GIL held, until somebody has read the event of each registered userfaultfd.
While a Monitor is being entered, nobody reads its own yet, and the thread that is about to change that needs the GIL.
That thread itself does not wait: a finalizer or signal handler may fork in it. Such a child does not get the region.
The same is true while a pager is replaced whose processes are all dead.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from aiouffd.pager.client import shared

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Beginnings", "beginnings"]


class Beginnings:
    """Which threads enter a Monitor now. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: list[int] = []

    @contextlib.contextmanager
    def begin(self, *, children: bool) -> Iterator[None]:
        """Have other threads' forks wait until the block is left, and wait for those that are under way.

        Args:
            children: forked children are to be served; else a fork waits for nobody.
        """
        if not children:
            yield
            return
        thread = threading.get_ident()
        with self._changed:
            self._threads.append(thread)
        try:
            yield
        finally:
            with self._changed:
                self._threads.remove(thread)
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Wait until no other thread is in `begin`, and the pagers read; keep all out of it."""
        thread = threading.get_ident()
        self._changed.acquire()
        self._changed.wait_for(lambda: all(other == thread for other in self._threads))
        shared.before_fork()

    def in_parent(self) -> None:
        """Let others in again: the fork is done, or has failed."""
        self._changed.release()

    def in_child(self) -> None:
        """Have only what this thread has begun: there are no others here."""
        self._changed = threading.Condition()


beginnings: Beginnings = Beginnings()
os.register_at_fork(
    before=beginnings.before_fork, after_in_parent=beginnings.in_parent, after_in_child=beginnings.in_child
)
