"""Ranges of what the clients of a session show: brought before they are touched, or dropped again.

What is dropped must be known not to have been written: so the pages of a session with a limit (`max_resident`) come
write-protected, and the first write to each is noted. That takes the client's memory file, and its registration.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import mmap
import os
import time
from typing import TYPE_CHECKING

from aiouffd.engine.protect import WrittenPages
from aiouffd.errors import ClosedError, HandoffError, SessionError, UffdError
from aiouffd.handoff.receive import enabled_features
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.file_lock import locked_anew
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.kernel.pagemap import data_ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from aiouffd.handoff.arrival import Handoff
    from aiouffd.kernel.userfaultfd import Userfaultfd
    from aiouffd.pager.client.client import PagerClient
    from aiouffd.server.clients import Client

__all__ = ["PROTECTED", "evict", "fill", "lacking", "memory_of", "notes_for", "prefetch"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_RELEASED = 2.0  # seconds for a pager to close the file of a client that has just left
_AGAIN = 0.02
PROTECTED = "register it with UFFDIO_REGISTER_MODE_WP, too (Linux 5.19)"


async def prefetch(pager: PagerClient, clients: Iterable[Client], offset: int, length: int, limit: int | None) -> None:
    """Bring a range of the source to each client that shows it, as far as it is missing there. Canceling is safe.

    Args:
        pager: serves them.
        clients: of one session.
        offset: where it begins in the source.
        length: bytes.
        limit: bytes that may be there at once; None: any.

    Raises:
        SourceError: it cannot be read.
        ValueError: it is more than the limit.
    """
    for client in clients:
        start, end = _within(client, offset, length)
        if limit is not None and end - start > limit:
            raise ValueError(f"{end - start} bytes cannot all be there: max_resident is {limit} - at `$.length`")
        with contextlib.suppress(ClosedError):  # it has ended meanwhile
            await asyncio.wrap_future(pager.request("prefetch", client.tenant, ranges=[(start, end - start)]))


async def evict(
    pager: PagerClient, clients: Iterable[Client], offset: int, length: int, limit: int | None, session: str
) -> int:
    """Drop what was not written of a range, of each client: a touch brings it from the source. Canceling is safe.

    Args:
        pager: serves them.
        clients: of one session.
        offset: where the range begins in the source.
        length: bytes.
        limit: of the session; None: it has none, and writes are not noted.
        session: its name.

    Returns:
        How many bytes were there.

    Raises:
        SessionError: nobody knows which pages were written.
    """
    if limit is None:
        raise SessionError(session, "does not know which pages were written: create it with max_resident")
    dropped = 0
    for client in clients:
        start, end = _within(client, offset, length)
        with contextlib.suppress(ClosedError):  # it has ended meanwhile
            asked = pager.request("evict", client.tenant, offset=start, length=end - start)
            dropped += await asyncio.wrap_future(asked)
    return dropped


async def fill(
    pager: PagerClient, clients: Mapping[str, Client], limit: int | None, filled: Callable[[Client], None]
) -> dict[int, str]:
    """Bring all that each client misses: it needs no pager any more. Canceling is safe: what was asked for goes on.

    Args:
        pager: serves them.
        clients: of one session, by the token of their memory: those that are there, as they come and go.
        limit: bytes of one that may be there at once; None: any.
        filled: called with each that has all.

    Returns:
        why, by the numbers of those that failed: they stay served.
    """

    async def fill_one(client: Client) -> str:
        if limit is not None and client.length > limit:
            return f"it has {client.length} bytes, and max_resident is {limit}"
        try:
            await asyncio.wrap_future(pager.request("release", client.tenant))
        except UffdError as error:
            if client.tenant.token not in clients:  # it has ended meanwhile
                return ""
            log.warning("%s cannot be filled: %s", client, error)
            return str(error)
        filled(client)
        return ""

    its = list(clients.values())
    whys = await asyncio.gather(*map(fill_one, its))
    return {client.number: why for client, why in zip(its, whys, strict=True) if why}


def _within(client: Client, offset: int, length: int) -> tuple[int, int]:
    """Return the part (start, end) of a range that a client may show."""
    return min(offset, client.end), min(offset + length, client.end)


def lacking(uffd: Userfaultfd, page_size: int, *, has_file: bool) -> str:
    """Return what a client lacks for its writes to be known, and its pages to be read and dropped; empty: nothing."""
    if not has_file:
        return "it has handed over no memory file: send the memfd that is mapped (shared) with the userfaultfd"
    if page_size > mmap.PAGESIZE:
        return "of huge pages of a memory file nobody knows which are there: use small ones"
    if Feature.WP_ASYNC in enabled_features(uffd.fileno()):
        return "its userfaultfd has UFFD_FEATURE_WP_ASYNC, so that the kernel lets all writes go on: do not enable it"
    return ""


def memory_of(handoff: Handoff, *, alone: bool) -> OwnedDescriptor:
    """Return the client's memory file, locked as long as anybody has it open who has got it from here. Blocks.

    Args:
        handoff: with such a file.
        alone: pages of it are dropped.

    Raises:
        HandoffError: others serve it, too, which must not be.
    """
    until = time.monotonic() + _RELEASED
    while True:
        try:
            file = locked_anew(handoff.memory.fileno(), os.O_RDWR, alone=alone)
        except BlockingIOError:
            if time.monotonic() > until:
                why = "its memory file is another client's, or a Monitor's, and pages are dropped of it (max_resident)"
                raise HandoffError(str(handoff.peer), why) from None
            time.sleep(_AGAIN)
        else:
            return file if not file.closed else handoff.memory


def notes_for(handoff: Handoff) -> WrittenPages:
    """Return notes of what was written of a memory, in which all is that is there already: the source has it not.

    Waits for the lock of the client's address space.

    Raises:
        HandoffError: what the client lacks.
    """
    regions, uffd, file = handoff.regions, handoff.uffd, handoff.memory
    reason = lacking(uffd, regions.page_size, has_file=not file.closed)
    for at in () if reason else regions.mappings:
        if uffd.try_writeprotect(at.start, at.end - at.start, abi.WRITEPROTECT_MODE_DONTWAKE) == -errno.ENOENT:
            reason = f"its memory at {at.start:#x} is not protected against writes: {PROTECTED}"
    if reason:
        raise HandoffError(str(handoff.peer), f"cannot have max_resident: {reason}")
    written = WrittenPages.create(regions.end, regions.page_size)
    with OwnedDescriptor(os.dup(file.fileno())) as kept:  # this may wait until after `handoff` is closed
        for start, end in data_ranges(kept.fileno(), regions.end):
            written.note(start, end - start)
    return written
