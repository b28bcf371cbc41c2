"""For spaces that nobody serves any more: who waits for a page, or touches a missing one, gets SIGBUS.

No hang, and no zeros: the descriptors stay open for as long as their processes live, also those of children that are
forked meanwhile. Where the operator has said so (`hold`), they wait: for whoever takes the memory over, or ends them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
from collections import Counter as Tally
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.owner import take_back
from aiouffd.errors import ClosedError
from aiouffd.kernel.abi import FaultFlag
from aiouffd.kernel.events import PageFault
from aiouffd.kernel.userfaultfd import Fork

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed import FileDescriptorLike

    from aiouffd.kernel.userfaultfd import Userfaultfd

__all__ = ["Forsaken", "LastResort", "on_error_of"]

log: logging.Logger = logging.getLogger("aiouffd.pager")

_OUTLOOK = {
    "sigbus": "pages that are touched are poisoned from now on",
    "retry": "clients are to be ended by their server, and pages that they touch until then are poisoned",
    "hold": "who touches a missing page waits from now on",
}


@attrs.define(eq=False, repr=False)
class Forsaken:
    """A space that nobody serves.

    Attributes:
        uffd: whoever let go of it last closes it.
        page_size: in bytes.
        ranges: (start, end) of what it shows: who sleeps there is woken, to fault anew.
        token: by which it, or the ancestor that it was forked from, is asked for.
        is_child: of a fork.
        words: by which its pages were asked to be dropped; -1: they were not.
        on_error: as in `Options`: who waits for a page goes on waiting where it is "hold".
    """

    uffd: Userfaultfd
    page_size: int
    ranges: list[tuple[int, int]]
    token: str = ""
    is_child: bool = False
    words: int = -1
    on_error: str = "sigbus"


class LastResort:
    """Attends to forsaken spaces. It opens no descriptor: that none is left may be why nobody serves."""

    def __init__(self, spaces: Iterable[Forsaken]) -> None:
        self._poller = select.poll()
        self.spaces: dict[int, Forsaken] = {}
        self.pending: list[tuple[Forsaken, PageFault]] = []
        for space in spaces:
            self._add(space)
        for space in list(self.spaces.values()):
            for start, end in space.ranges:
                space.uffd.try_wake(start, end - start)

    @property
    def outlook(self) -> str:
        """What becomes of threads that touch a missing page from now on, as a log says it."""
        found = Tally(space.on_error for space in self.spaces.values())
        if len(found) < 2:
            return _OUTLOOK[next(iter(found), "sigbus")]
        return "; ".join(
            f"in {count} of {found.total()} spaces {_OUTLOOK[what]}" for what, count in found.most_common()
        )

    def wait(self, milliseconds: float, *others: FileDescriptorLike) -> set[int]:
        """Wait until a space has something to say, or another descriptor is readable; return the numbers of those."""
        for other in others:
            self._poller.register(other, select.POLLIN)
        try:
            return {fd for fd, _ in self._poller.poll(milliseconds)}
        finally:
            for other in others:
                self._poller.unregister(other)

    def attend(self) -> bool:
        """Let all go that wait now; tell whether there were any. What the kernel puts off is in `pending`."""
        faults, self.pending = self.pending, []
        for fd in self.wait(0):
            faults += self._read(fd)
        for space, fault in faults:
            if not _let_go(space, fault):
                self.pending.append((space, fault))
        return bool(faults)

    def look(self) -> None:
        """Forget the spaces whose process has ended."""
        for fd, space in list(self.spaces.items()):
            if space.uffd.gone():
                self._drop(fd)

    def forget(self, token: str) -> None:
        """Forget a space whose owner looks after it; its forked children stay."""
        for fd, space in list(self.spaces.items()):
            if space.token == token and not space.is_child:
                self._drop(fd)

    def close(self) -> None:
        """Let go of all."""
        self.spaces.clear()
        self.pending.clear()

    def _add(self, space: Forsaken) -> None:
        if space.words >= 0:
            take_back(space.words)
        self.spaces[space.uffd.fileno()] = space
        self._poller.register(space.uffd, select.POLLIN)

    def _drop(self, fd: int) -> None:
        space = self.spaces.pop(fd)
        self._poller.unregister(fd)
        self.pending = [item for item in self.pending if item[0] is not space]

    def _read(self, fd: int) -> list[tuple[Forsaken, PageFault]]:
        space = self.spaces[fd]
        faults: list[tuple[Forsaken, PageFault]] = []
        if not space.uffd.intact:  # its owner has closed it, and the number may be another file's
            return faults
        with contextlib.suppress(OSError, ClosedError):  # EMFILE: a child's descriptor, tried again
            os.set_blocking(fd, False)  # whoever has handed it over may have cleared the flag
            for event in space.uffd.read():
                if isinstance(event, PageFault):
                    faults.append((space, event))
                elif isinstance(event, Fork):
                    self._add(attrs.evolve(space, uffd=event.uffd, is_child=True))
        return faults


def _let_go(space: Forsaken, fault: PageFault) -> bool:
    """Let a thread go; tell whether that was possible now."""
    uffd, size = space.uffd, space.page_size
    page = fault.address & -size
    if fault.flags & FaultFlag.WP:
        result = uffd.try_writeprotect(page, size, 0)
    elif fault.flags & FaultFlag.MINOR:
        result = uffd.try_continue(page, size, 0)
    elif space.on_error == "hold":
        return True
    else:
        result = uffd.try_poison(page, size, 0)
    if result == -errno.EINVAL:
        log.error("thread %d waits for ever for the page at %#x: POISON needs Linux 6.6", fault.thread_id, page)
    elif result in (-errno.EEXIST, -errno.ENOENT, -errno.EFAULT):
        uffd.try_wake(page, size)
    return result != -errno.EAGAIN


def on_error_of(record: dict[str, Any]) -> str:
    """Return from the record of a source what becomes of a page that cannot be had of what it serves."""
    return str(record["options"].get("on_error", "sigbus"))
