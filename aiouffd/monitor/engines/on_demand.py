"""How private memory of this process is dropped by a pager: a thread here does it, when the pager asks."""

from __future__ import annotations

import mmap
import os
import re
from functools import cache
from typing import TYPE_CHECKING, Final

from aiouffd import native
from aiouffd.errors import UffdError
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.locked import is_locked
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.userfaultfd import kernel_features

if TYPE_CHECKING:
    from aiouffd.kernel.userfaultfd import Userfaultfd

__all__ = ["Dropping", "may_be_dropped"]

_BATCHES: Final = 6, 18  # before, UFFDIO_MOVE has each processor flush its TLB for each page


def may_be_dropped() -> bool:
    """Tell whether a thread of this process can drop what a pager asks for."""
    try:
        Pagemap().close()
    except OSError:  # there is no /proc; or it has given up its rights, by setuid(2) for example
        return False
    return _pages_can_be_moved()


@cache
def _pages_can_be_moved() -> bool:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if found is None or tuple(map(int, found.groups())) < _BATCHES or native.reason():
        return False
    try:
        return Feature.MOVE in kernel_features()
    except UffdError:
        return False


class Dropping:
    """A thread that drops pages of a region when it is asked, and what it is asked by.

    Args:
        uffd: of the region; it stays the caller's.
        start: where the region lies.

    Raises:
        OSError: no thread can be started; there is no /proc.
    """

    def __init__(self, uffd: Userfaultfd, start: int) -> None:
        from aiouffd.native.dropper import Dropper  # noqa: PLC0415 - few Monitors drop pages

        self._pagemap = Pagemap()
        self._words = OwnedDescriptor(os.memfd_create("aiouffd-asked", os.MFD_CLOEXEC))
        os.ftruncate(self._words.fileno(), mmap.PAGESIZE)
        self._dropper = Dropper(uffd.fileno(), self._words.fileno(), locked=is_locked(start))

    @property
    def memory(self) -> tuple[OwnedDescriptor, OwnedDescriptor]:
        """What a pager asks by."""
        return self._words, self._pagemap

    def end(self) -> None:
        """Drop nothing more: before the region is given back, whose place may be another's then."""
        self._dropper.close()

    def close(self) -> None:
        """Close what the pager has got as well."""
        self.end()
        self._words.close()
        self._pagemap.close()
