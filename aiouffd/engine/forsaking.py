"""A space whose events cannot be read any more: nobody is to wait there for ever, and nobody is to read zeros."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING, Final

from aiouffd.engine.runs import Op, Run
from aiouffd.ranges import pieces

if TYPE_CHECKING:
    from aiouffd.engine.space import Space

__all__ = ["forsake"]

log: logging.Logger = logging.getLogger("aiouffd")

_PIECE: Final = 512 << 10  # bytes that are poisoned in one turn of the loop: 128 pages, if each of them is there
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
        for at, size in pieces(mapping.start, mapping.end, space.page_size, _PIECE):
            if not await _poison(space, Run(Op.POISON, at, -1, size)):
                log.critical("%r: its pages cannot be poisoned (UFFDIO_POISON: Linux 6.6), and its threads wait", space)
                return False
            await asyncio.sleep(0)
    space.unregister()
    space.wake_all()
    return True


async def _poison(space: Space, run: Run) -> bool:
    while run.left and not space.is_gone:
        space.uffd.fileno()  # not closed
        result = space.resolver.resolve(run, wake=False)
        if result == -errno.ESRCH:
            space.gone()
        elif result in (-errno.EAGAIN, -errno.ENOMEM):  # a change of the layout that nobody has read, for one
            await asyncio.sleep(_PAUSE)
        elif result:
            return False
    return True
