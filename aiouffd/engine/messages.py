"""What a space does with the messages of its descriptor.

The kernel hands out page faults before older layout events. So the layout events of one read are applied first, and
its faults are looked up in the newest layout. That cannot resolve a fault too early: while an event is unread, or its
thread has not run again, every resolving ioctl answers EAGAIN.
"""

from __future__ import annotations

import logging
import operator
import sys
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from aiouffd.engine.bound import losing
from aiouffd.engine.runs import Op
from aiouffd.engine.statistics import Counter
from aiouffd.errors import PagerError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import FaultFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiouffd.engine.space import Space

__all__ = ["COUNTER_OF_EVENT", "apply_layout_event", "emptied", "serve_messages"]

log: logging.Logger = logging.getLogger("aiouffd")

_MESSAGE = abi.PAGEFAULT_MESSAGE.unpack_from
_ITER = abi.PAGEFAULT_MESSAGE.iter_unpack
_SIZE = abi.MESSAGE_SIZE
_FAULT = abi.EVENT_PAGEFAULT
_by_address = operator.itemgetter(2)
_FAULTS, _JOINED = int(Counter.FAULTS), int(Counter.JOINED)
_PAGE_IS_THERE = int(FaultFlag.WP | FaultFlag.MINOR)
_IS_PROTECTED = int(FaultFlag.WP)  # of a file that all map privately, a page may be there that is not to be shown
_MINOR_AROUND = 64 << 10
COUNTER_OF_EVENT = {
    abi.EVENT_FORK: int(Counter.FORKS),
    abi.EVENT_REMAP: int(Counter.REMAPS),
    abi.EVENT_REMOVE: int(Counter.REMOVES),
    abi.EVENT_UNMAP: int(Counter.UNMAPS),
}


def serve_messages(space: Space, buffer: memoryview, length: int, commit: Callable[[Space, list[bytes]], None]) -> None:
    """Act on the messages in buffer[:length].

    Args:
        space: whose descriptor they were read from.
        buffer: whole messages of 32 bytes.
        length: bytes.
        commit: makes layout events durable before they are acted on.
    """
    began = perf_counter_ns()
    if length == _SIZE and buffer[0] == _FAULT:
        _, flags, address, thread = _MESSAGE(buffer)
        space.counters.words[_FAULTS] += 1
        page = address & -space.page_size
        if not _is_under_way(space, page, flags, thread, began):
            _serve(space, [(page, flags, thread)], began)
        return
    count = bytes(buffer[0:length:_SIZE]).count(_FAULT)
    space.counters.words[_FAULTS] += count
    if count * _SIZE != length:
        _apply_layout_events(space, buffer, length, commit)
    mask = -space.page_size
    missing: list[tuple[int, int, int]] = []
    last = -1
    # Sorted, so that neighbours are together, and a page that several threads wait for is there once.
    for code, flags, address, thread in sorted(_ITER(buffer[:length]), key=_by_address):
        page = address & mask
        if code == _FAULT and page != last:
            last = page
            if not _is_under_way(space, page, flags, thread, began):
                missing.append((page, flags, thread))
    if missing:
        _serve(space, missing, began)


def _is_under_way(space: Space, page: int, flags: int, thread: int, began_ns: int) -> bool:
    """Serve a fault whose page is present or on its way; tell whether it was one."""
    flights = space.flights
    if flights and (flight := flights.get(page)) is not None:
        space.counters.words[_JOINED] += 1
        flight.want(page, flags, thread)
        space.backend.follow(space, page)
        return True
    if flags & (_PAGE_IS_THERE if space.backend.one_copy is None else _IS_PROTECTED):
        _serve_present(space, page, flags, thread)
        return True
    if space.deferred and space.deferred.fills(page):  # as with a flight: another try would be put off, too
        space.counters.words[_JOINED] += 1
        return True
    return bool(space.remainders) and space.hasten(page, began_ns)


def _serve(space: Space, faults: list[tuple[int, int, int]], began_ns: int) -> None:
    if space.closing:
        space.poison(page for page, _, _ in faults)
        return
    try:
        space.backend.serve(space, faults, began_ns)
    except Exception as error:
        # A defect of ours, or of a source's `locate` or `read_nowait`: it costs these pages, and no hang.
        log.exception("faults at %s could not be served", ", ".join(f"{page:#x}" for page, _, _ in faults))
        space.readahead.forget(0, sys.maxsize)  # what was to come along has not come
        space.counters.words[Counter.SOURCE_ERRORS] += 1
        failure = PagerError(f"the page at {faults[0][0]:#x} could not be served: {error!r}")
        space.give_up([page for page, _, _ in faults if page not in space.flights], failure)


def _serve_present(space: Space, page: int, flags: int, thread: int) -> None:
    """Serve a write to a protected page, or a fault on a page that only the file has (minor)."""
    words = space.counters.words
    if flags & FaultFlag.WP:
        words[Counter.WRITE_FAULTS] += 1
        if space.capture is None or not space.capture.keeps(space, page, flags, thread):
            space.backend.written(space, page, flags, thread)
        return
    words[Counter.MINOR_FAULTS] += 1
    start, end, first = space.mappings.locate(page)
    # The neighbours that the file has are mapped as well; the kernel stops at the first that it has not.
    block = max(space.page_size, min(_MINOR_AROUND, space.readahead.limit))
    length = min(block - (first + page - start) % block, end - page) if first >= 0 else 0
    if length > space.page_size:
        words[Counter.CONTINUES] += 1  # first: its toucher may kill this process before it goes on
    came = space.uffd.try_continue(page, length, space.resolver.minor_mode) if length > space.page_size else 0
    if came <= 0:
        space.resolve([space.run(Op.CONTINUE, page)])
    elif space.bound is not None:
        space.bound.came(first + page - start, came)


def _apply_layout_events(
    space: Space, buffer: memoryview, length: int, commit: Callable[[Space, list[bytes]], None]
) -> None:
    layout: list[bytes] = []
    for at in range(0, length, _SIZE):
        code = buffer[at]
        if code in COUNTER_OF_EVENT:
            layout.append(bytes(buffer[at : at + _SIZE]))
        elif code != _FAULT:
            log.warning("unknown userfaultfd event %#x: %s", code, bytes(buffer[at : at + _SIZE]).hex())
    commit(space, layout)
    for message in layout:
        apply_layout_event(space, message)


def emptied(space: Space, start: int, end: int) -> None:
    """Take note that [start, end) was emptied: what is mapped there holds zeros."""
    with losing(space, start, end):
        space.mappings.remove(start, end)
    space.changed(start, end)


def _elsewhere(space: Space, start: int, end: int) -> Iterator[tuple[Any, int, int]]:
    """Yield where else the file is shown of which [start, end) is a hole now."""
    return iter(()) if space.file is None else space.file.elsewhere(space, start, end)


def apply_layout_event(space: Space, message: bytes) -> None:
    """Apply one FORK, REMAP, REMOVE or UNMAP message."""
    code = message[0]
    child: Space | None = None
    space.counters.words[COUNTER_OF_EVENT[code]] += 1
    if code == abi.EVENT_FORK:
        child = space.forked(*abi.FORK_MESSAGE.unpack(message))
        if space.capture is not None:
            space.capture.forked(child)
        if space.on_child is not None:
            space.on_child(space, child)
    elif code == abi.EVENT_REMAP:
        source, destination, size = abi.REMAP_MESSAGE.unpack(message)
        space.mappings.remap(source, destination, size, shared=space.file is not None)
        space.changed(source, source + size)
        space.changed(destination, destination + size)
    else:
        start, end = abi.RANGE_MESSAGE.unpack(message)
        if code == abi.EVENT_REMOVE:
            for each, low, high in [(space, start, end), *_elsewhere(space, start, end)]:
                emptied(each, low, high)
                if each is not space and each.bound is not None:
                    each.backend.opened(each)
        else:
            with losing(space, start, end):
                space.mappings.unmapped(start, end)
            space.changed(start, end)
    space.backend.layout(space, code, message, child)
