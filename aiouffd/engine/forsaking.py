"""A space whose events cannot be read any more: nobody is to wait there for ever, and nobody is to read zeros."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aiouffd.engine.space import Space

__all__ = ["forsake"]

log: logging.Logger = logging.getLogger("aiouffd")

_PIECE: Final = 2 << 20  # bytes that are poisoned at once: some 50 us
_TOGETHER: Final = 64  # tries in one turn of the loop
_PAUSE: Final = 0.064  # seconds, while the kernel puts it off


async def forsake(space: Space) -> bool:
    """Poison all that is missing, and give the memory back to its process; tell whether that was possible.

    Which threads wait is in messages that nobody reads. So each page that is missing is poisoned (SIGBUS), as where a
    source fails for good. Its page tables are what that costs. Then nobody has to be asked any more.

    Raises:
        ClosedError: the space was closed meanwhile.
    """
    space.refuse()
    for mapping in list(space.mappings):
        if not await _poison(space, mapping.start, mapping.end):
            log.critical("%r: its pages cannot be poisoned (UFFDIO_POISON: Linux 6.6), and its threads wait", space)
            return False
    space.unregister()
    space.wake_all()
    return True


async def _poison(space: Space, start: int, end: int) -> bool:
    page = space.page_size
    at, step, tries = start, max(_PIECE, page), 0
    while at < end and not space.is_gone:
        space.uffd.fileno()  # not closed
        size = min(step, end - at)
        result = space.uffd.try_poison(at, size, 0)
        tries += 1
        if result > 0:
            at, step = at + result, min(2 * step, max(_PIECE, page))
        elif result in (-errno.EAGAIN, -errno.ENOMEM):  # a change of the layout that nobody has read, for one
            await asyncio.sleep(_PAUSE)
        elif result == -errno.ENOENT and size > page:  # more than one VMA
            step = (size // page + 1) // 2 * page
        elif result in (-errno.EEXIST, -errno.ENOENT):  # it is there, or unmapped
            at += page
        elif result in (-errno.ESRCH, -errno.ENOSPC):
            space.gone()
        else:
            return False
        if tries % _TOGETHER == 0:
            await asyncio.sleep(0)
    return True
