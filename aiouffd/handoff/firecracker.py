"""Firecracker's handoff: one message with a JSON array of regions, and the userfaultfd as SCM_RIGHTS.

    [{"base_host_virt_addr": ..., "size": ..., "offset": ..., "page_size": ...}, ...]

The array has neither a length nor a terminator: it is complete when it parses. `page_size_kib` is the older name of
`page_size`, and holds bytes, too. Some clients send further descriptors (a memfd); other keys are ignored, but for
`aiouffd` in the first element, which our own clients send to ask for answers (see `link`), together with a pipe.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import mmap
import os
import select
from typing import TYPE_CHECKING, Any, Final

import attrs

from aiouffd.engine.mappings import Mapping
from aiouffd.errors import HandoffError
from aiouffd.handoff.receive import Peer, is_userfaultfd
from aiouffd.handoff.receive import receive as receive_some
from aiouffd.kernel.memory import address_of, unreadable
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    import socket

__all__ = ["Handoff", "Regions", "encode", "parse", "receive"]

MOST_BYTES: Final = 1 << 20
MOST_REGIONS: Final = 4096
_MOST_FDS: Final = 16
_BLANKS: Final = 256  # that may follow the end of the array
_TRIES: Final = 16  # so often an array may seem to end within a message
_ADDRESSES: Final = 1 << 57  # what a process can map at most, on any 64-bit architecture of today
_PAGES: Final = range(12, 22)  # 4 KiB to 2 MiB, as powers of two: a COPY of 1 GiB would keep the others for seconds


@attrs.frozen
class Regions:
    """What the array says.

    Attributes:
        mappings: addresses of the peer, and the offsets in its source that they show.
        page_size: bytes, the same for all.
        extra: what one of our own clients asks for; None: it is not one of ours.
    """

    mappings: tuple[Mapping, ...]
    page_size: int
    extra: dict[str, Any] | None


@attrs.frozen
class Handoff:
    """A handed-over address space.

    Attributes:
        peer: who sent it.
        regions: what it says.
        uffd: non-blocking, and the receiver's.
        tether: of one of our own clients: the end of a pipe, which tells it when nobody serves any more; else -1. The
            receiver's, too.
    """

    peer: Peer
    regions: Regions
    uffd: Userfaultfd
    tether: int = -1

    def close(self) -> None:
        """Close both descriptors."""
        self.uffd.close()
        if self.tether >= 0:
            os.close(self.tether)


def encode(mappings: list[Mapping], page_size: int, extra: dict[str, Any] | None = None) -> bytes:
    """Return the message for these mappings."""
    items: list[dict[str, Any]] = [
        {
            "base_host_virt_addr": mapping.start,
            "size": mapping.end - mapping.start,
            "offset": mapping.offset,
            "page_size": page_size,
        }
        for mapping in mappings
    ]
    if extra is not None:
        items[0]["aiouffd"] = extra
    return json.dumps(items).encode()


def parse(data: bytes | bytearray) -> Regions:
    """Check the array.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        items = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ValueError("not a JSON array of at least one region")
    if len(items) > MOST_REGIONS:
        raise ValueError(f"{len(items)} regions, more than {MOST_REGIONS}")
    sizes = {_number(item, "page_size" if "page_size" in item else "page_size_kib") for item in items}
    if len(sizes) > 1:
        raise ValueError(f"regions of {len(sizes)} different page sizes")
    page = sizes.pop()
    if page & (page - 1) or page.bit_length() - 1 not in _PAGES:
        raise ValueError(f"a page size of {page} bytes: there are those of 4 KiB to 2 MiB")
    mappings = sorted((_mapping(item, page) for item in items), key=lambda mapping: mapping.start)
    for before, after in itertools.pairwise(mappings):
        if before.end > after.start:
            raise ValueError(f"regions overlap at {after.start:#x}")
    extra = items[0].get("aiouffd")
    if extra is not None and not isinstance(extra, dict):
        raise ValueError("what is asked for beside the regions is no object")
    return Regions(tuple(mappings), page, extra)


def _number(item: dict[str, Any], key: str) -> int:
    value = item.get(key)
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} is {value!r:.50}, no natural number")
    if value >> 100:  # would fill the log
        raise ValueError(f"{key} is a number of {value.bit_length()} bits")
    return value


def _mapping(item: dict[str, Any], page: int) -> Mapping:
    start, size, offset = (_number(item, key) for key in ("base_host_virt_addr", "size", "offset"))
    if not size or start + size > _ADDRESSES or offset + size > _ADDRESSES:
        raise ValueError(f"a region of {size} bytes at {start:#x} from offset {offset:#x}")
    if start % page or size % page or offset % page:
        raise ValueError(f"a region at {start:#x}, {size:#x} bytes, offset {offset:#x}, not aligned to {page} bytes")
    return Mapping(start, start + size, offset)


def check_size(regions: Regions, size: int) -> None:
    """Check that a source of `size` bytes has what the regions want; its last page may be a part of one.

    Raises:
        ValueError: it has not.
    """
    for mapping in regions.mappings:
        end = mapping.offset + mapping.end - mapping.start
        if end > align_up(size, regions.page_size):
            raise ValueError(f"a region reaches to offset {end:#x} of a source of {size:#x} bytes")


async def receive(connection: socket.socket, timeout: float) -> Handoff:  # noqa: ASYNC109 - of the whole exchange
    """Take a handoff from a connection just accepted, which is non-blocking and stays the caller's.

    Canceling is safe: what has arrived is closed.

    Raises:
        HandoffError: it is none; `peer` and `reason` say whose and why.
    """
    peer = Peer.of(connection)
    fds: list[int] = []
    try:
        async with asyncio.timeout(timeout):
            regions = await _gather(connection, fds)
        uffd = _take(fds)
        _check_pages(uffd, regions)
        return Handoff(peer, regions, uffd, fds.pop() if regions.extra is not None and fds else -1)
    except TimeoutError:
        raise HandoffError(str(peer), f"sent no complete handoff within {timeout:g} s") from None
    except (ValueError, OSError) as error:
        raise HandoffError(str(peer), str(error)) from error
    finally:
        for fd in fds:
            os.close(fd)


async def _gather(connection: socket.socket, fds: list[int]) -> Regions:
    data = bytearray()
    tries = 0
    while True:
        piece, more = await receive_some(connection, 64 << 10, _MOST_FDS)
        fds += more
        if len(fds) > _MOST_FDS:
            raise ValueError(f"more than {_MOST_FDS} descriptors")
        if not piece:
            raise ValueError(f"closed the connection after {len(data)} bytes of a handoff")
        data += piece
        if len(data) > MOST_BYTES:
            raise ValueError(f"a handoff of more than {MOST_BYTES} bytes")
        # Whoever sends it byte by byte gets no parse for each of them, and no copy.
        if not data[-_BLANKS:].rstrip().endswith(b"]"):
            continue
        try:
            return parse(data)
        except ValueError:
            tries += 1
            if tries > _TRIES or _is_whole(data):
                raise


def _is_whole(data: bytes | bytearray) -> bool:
    """Tell whether there is nothing to wait for: it is JSON, or can become none."""
    try:
        json.loads(data)
    except json.JSONDecodeError as error:
        return error.pos < len(data) and not error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return True
    return True


def _take(fds: list[int]) -> Userfaultfd:
    """Take the one userfaultfd out of what has arrived.

    Raises:
        ValueError: there is none, or several, or it cannot be used.
    """
    found = [fd for fd in fds if is_userfaultfd(fd)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} userfaultfds among {len(fds)} descriptors; one is needed")
    fd = found[0]
    os.set_blocking(fd, False)  # else poll(2) reports POLLERR for ever, and a read would stop the loop
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if any(events & select.POLLERR for _, events in poller.poll(0)):
        raise ValueError("its userfaultfd has not done the UFFDIO_API handshake")
    fds.remove(fd)
    uffd = Userfaultfd.from_fd(fd)
    if uffd.gone():
        uffd.close()
        raise ValueError("the process that owns the memory has ended")
    return uffd


def _check_pages(uffd: Userfaultfd, regions: Regions) -> None:
    """Check that the memory has the pages that the array says, as far as it is registered; else close the descriptor.

    To copy larger pages than there are would meet some that are present, and go on doing so; huge pages take no
    smaller ones, which the kernel looks at before it reads.

    Raises:
        ValueError: it has others.
    """
    for mapping in regions.mappings:
        found = uffd.try_copy(mapping.start, address_of(unreadable()), mmap.PAGESIZE, 0)
        if found in (-errno.EINVAL, -errno.EFAULT, -errno.EEXIST):
            huge = found == -errno.EINVAL
            if huge != (regions.page_size > mmap.PAGESIZE):
                uffd.close()
                kind = "larger" if huge else "smaller"
                raise ValueError(f"the memory at {mapping.start:#x} has {kind} pages than {regions.page_size} bytes")
