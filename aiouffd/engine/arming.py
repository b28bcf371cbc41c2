"""Write protection of an image, in each space that shows it."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from typing import TYPE_CHECKING, Any, Protocol

from aiouffd.engine.mappings import ZEROS
from aiouffd.engine.runs import Op, Run
from aiouffd.errors import OperationError, RangeGoneError, UnsupportedError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import mapped
from aiouffd.kernel.userfaultfd import is_registered
from aiouffd.ranges import Range, RangeSet, pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiouffd.engine.mappings import Mappings
    from aiouffd.engine.places import Places
    from aiouffd.engine.resolver import Resolver

__all__ = ["NEITHER", "Arming"]

NEITHER = abi.WRITEPROTECT_MODE_WP | abi.WRITEPROTECT_MODE_DONTWAKE
"""A mode of WRITEPROTECT that asks only whether the layout is changing. The kernel says so (EAGAIN) before it refuses
what cannot be: to protect wakes nobody (EINVAL). That takes no lock."""


_LIFTED = 64 << 20  # bytes that are lifted in one turn
_RETRY = 0.001  # seconds


class _Space(Protocol):
    """What is needed of a space."""

    uffd: Any
    page_size: int
    mappings: Mappings
    resolver: Resolver
    closing: bool
    is_gone: bool
    on_changed: set[Callable[[int, int], None]]


class Arming:
    """What Linux 6.3 and later does at once is done in parts before: a range may have several mappings.

    Args:
        spaces: the memory's; and those of forked children that share it, at the same addresses.
        places: which address has which offset of the image.
        modes: of the registration, to which write protection is added; None: another process has registered that.
        changed: called with the addresses (start, end) of each change of the layout, from the first `register` on.

    Attributes:
        spaces: these, and those of children that have come since.
        shared: whether forked children have the same memory; to be said before any is forked.
    """

    def __init__(
        self, spaces: Sequence[Any], places: Places, modes: int | None, changed: Callable[[int, int], None]
    ) -> None:
        self.spaces: list[Any] = list(spaces)
        self.shared: bool = False
        self._places = places
        self._modes = modes
        self._changed = changed
        self._registered: list[_Space] = []

    @property
    def served(self) -> list[Any]:
        """The spaces that are served still: a forked child may have ended."""
        return [space for space in self.spaces if not space.closing]

    def register(self) -> None:
        """Have writes to protected pages be told of, from the first snapshot on.

        Memory that is registered for that already is not registered again: of a part that a program has unmapped by
        itself, other memory would be.

        Raises:
            UnsupportedError: the kernel cannot protect this memory.
        """
        self.spaces[1:] = [each for each in self.spaces[1:] if not (each.closing or each.is_gone or each.uffd.gone())]
        self._registered = [each for each in self._registered if each in self.spaces]
        for space in (each for each in self.spaces if each not in self._registered):
            if self._modes is not None and not self._modes & RegisterMode.WP:
                try:
                    self._add_mode(space, self._modes)
                except OperationError:
                    if space is self.spaces[0] or not space.uffd.gone():  # else a child has just ended
                        raise
            self._tell(space)

    def _add_mode(self, space: _Space, modes: int) -> None:
        needed = Feature.PAGEFAULT_FLAG_WP
        if self.shared or space.page_size > mmap.PAGESIZE:
            needed |= Feature.WP_HUGETLBFS_SHMEM
        if missing := needed & ~space.uffd.features:
            raise UnsupportedError(f"{missing!r}, which a snapshot of this memory needs", repr(space.uffd.features))
        ranges = RangeSet(Range.between(*each) for each in self._places.mapped(space.mappings))
        for run in space.mappings:  # what was moved elsewhere is mapped with protection as well: see `protect_minor`
            ranges.add(run.start, run.end)
        for part in ranges:
            # Nobody tells an engine of this process what was unmapped, nor what was mapped in its place.
            tells = Feature.EVENT_UNMAP in space.uffd.features
            for each in [part] if tells else mapped(part.start, part.length):
                if tells or is_registered(space.uffd, each.start, space.page_size):
                    space.uffd.register(each.start, each.length, RegisterMode(modes) | RegisterMode.WP)

    def _tell(self, space: _Space) -> None:
        space.resolver.protect_minor()
        space.on_changed.add(self._changed)
        self._registered.append(space)

    def forked(self, child: _Space) -> None:
        """Take note of a forked child, whose pages are protected as its parent's: it writes to shared memory, too."""
        self.spaces.append(child)
        if self.spaces[0] in self._registered:  # so is the child
            self._tell(child)

    def leave(self) -> None:
        """Tell of changes no longer."""
        for space in self.spaces:
            space.on_changed.discard(self._changed)

    @property
    def is_changing(self) -> bool:
        """Whether a layout is changing: munmap(2) and mremap(2) are told of when the pages have gone."""
        return -errno.EAGAIN in [space.uffd.try_writeprotect(0, space.page_size, NEITHER) for space in self.served]

    def protect(self, start: int, end: int) -> bool:
        """Protect the pages at some offsets, which are there; False: the layout is changing.

        Raises:
            RangeGoneError: another process has not registered its memory so.
        """
        for space in self.served:
            gone = space.resolver.gone
            for place in self._places.addresses(start, end):
                length = place.end - place.start
                result = space.resolver.resolve(Run(Op.PROTECT, place.start, ZEROS, length), wake=False)
                if result == -errno.EAGAIN:
                    return False
                if result not in (0, -errno.ESRCH):  # its process is gone
                    raise OSError(-result, os.strerror(-result), "UFFDIO_WRITEPROTECT")
                if space.resolver.gone != gone and self._modes is None and space is self.spaces[0]:
                    raise RangeGoneError("UFFDIO_WRITEPROTECT", place.start, length, errno.ENOENT)  # else unmapped now
        return True

    def lift(self, start: int, end: int) -> bool:
        """Lift the protection of addresses; False: the layout is changing."""
        runs = [(space.resolver, Run(Op.UNPROTECT, start, ZEROS, end - start)) for space in self.served]
        return -errno.EAGAIN not in [resolver.resolve(run, wake=True) for resolver, run in runs]

    async def disarm(self) -> None:
        """Lift the protection of all of it."""
        for space in self.spaces:
            for low, high in self._places.mapped(space.mappings):
                for at, size in pieces(low, high, space.page_size, _LIFTED):
                    while not (space.closing or space.is_gone or self.lift(at, at + size)):  # noqa: ASYNC110 - no event
                        await asyncio.sleep(_RETRY)
                    await asyncio.sleep(0)
