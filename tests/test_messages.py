"""`engine.messages`: layout events before faults, and each fault where it belongs."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import pytest
from engine_world import BASE, ELSEWHERE, SIZE, Held, World, turns
from pattern import PAGE, content

from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.messages import serve_messages
from aiouffd.engine.runs import Op, Run
from aiouffd.kernel import abi
from aiouffd.kernel.abi import FaultFlag
from aiouffd.testing import POISONED

if TYPE_CHECKING:
    from struct import Struct

    from aiouffd.engine.space import Space


def fault(page: int, flags: int = 0) -> bytes:
    """Return a message."""
    return abi.PAGEFAULT_MESSAGE.pack(abi.EVENT_PAGEFAULT, flags, BASE + page * PAGE + 100, 7)


def event(code: int, layout: Struct, *values: int) -> bytes:
    """Return a message."""
    return bytes([code]) + layout.pack(*values)[1:]


def removed(page: int, count: int = 1, code: int = abi.EVENT_REMOVE) -> bytes:
    """Return a message."""
    return event(code, abi.RANGE_MESSAGE, BASE + page * PAGE, BASE + (page + count) * PAGE)


def serve(world: World, *messages: bytes) -> list[list[bytes]]:
    """Act on messages; return what was committed, and see that nothing was acted on before."""
    data = memoryview(bytearray(b"".join(messages)))
    committed: list[list[bytes]] = []

    def commit(space: Space, layout: list[bytes]) -> None:
        assert space is world.space
        assert space.mappings.generation == generation
        committed.append(layout)

    generation = world.space.mappings.generation
    serve_messages(world.space, data, len(data), commit)
    return committed


@pytest.mark.parametrize("readahead", [0, 4 * PAGE])
def test_a_fault_that_was_read_with_the_removal_of_its_page(readahead: int) -> None:
    """The event counts, although it was read behind the fault: the page is zeros, and no byte of the source."""
    world = World(readahead, located=True)
    assert serve(world, fault(3), fault(9), removed(3)) == [[removed(3)]]
    assert world.uffd.pages[BASE + 3 * PAGE] == bytes(PAGE)
    assert world.uffd.pages[BASE + 9 * PAGE] == content(9 * PAGE, PAGE)


def test_events_are_committed_together_and_in_order() -> None:
    """Before the first of them is acted on; without an event nothing is."""
    world = World(0, located=True)
    assert serve(world, fault(1)) == []
    assert serve(world, fault(1), fault(2)) == []
    messages = [removed(1), removed(8, 2, abi.EVENT_UNMAP)]
    assert serve(world, messages[0], fault(5), messages[1]) == [messages]
    assert serve(world, removed(4)) == [[removed(4)]]
    found = world.counters.snapshot()
    assert (found.removes, found.unmaps, found.faults) == (2, 1, 4)
    assert world.space.mappings.find(BASE + 8 * PAGE) is None


def test_a_move() -> None:
    """Both ranges have changed; the pages are where they were moved to."""
    world = World(0, located=True)
    changed: list[tuple[int, int]] = []
    world.space.on_changed.add(lambda start, end: changed.append((start, end)))
    serve(world, event(abi.EVENT_REMAP, abi.REMAP_MESSAGE, BASE + 4 * PAGE, ELSEWHERE, 2 * PAGE))
    assert changed == [(BASE + 4 * PAGE, BASE + 6 * PAGE), (ELSEWHERE, ELSEWHERE + 2 * PAGE)]
    assert world.space.mappings.locate(ELSEWHERE) == (ELSEWHERE, ELSEWHERE + 2 * PAGE, 4 * PAGE)
    assert world.space.mappings.locate(BASE + 4 * PAGE)[1] == 0
    assert world.counters.snapshot().remaps == 1
    assert world.counters.snapshot().wakes == 2


def test_an_unknown_event_is_logged_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """What comes with it is served."""
    logging.getLogger("aiouffd").propagate = True
    world = World(0, located=True)
    assert serve(world, b"\x55" + bytes(31), fault(1)) == [[]]
    assert world.uffd.pages == {BASE + PAGE: content(PAGE, PAGE)}
    assert f"unknown userfaultfd event 0x55: 55{bytes(31).hex()}" in caplog.text


async def test_a_page_that_several_threads_wait_for_is_brought_once() -> None:
    """Within one read, and joined later; a fault that joins is counted."""
    source = Held()
    world = World(0, source=source)
    serve(world, fault(2), fault(2), fault(1))
    await turns()
    assert sorted(read[0] for read in source.reads) == [PAGE, 2 * PAGE]
    serve(world, fault(2))
    serve(world, fault(1), fault(2))
    found = world.counters.snapshot()
    assert (found.faults, found.joined) == (6, 3)
    for index in range(2):
        source.answer(index)
    await turns()


def test_a_window_that_is_being_brought() -> None:
    """A fault there is served out of turn, alone and among others."""
    world = World(0, located=True)
    world.space.resolve_later([Run(Op.ZEROPAGE, BASE + 8 * PAGE, 8 * PAGE, 8 * PAGE)])
    serve(world, fault(9))
    assert BASE + 9 * PAGE in world.uffd.pages
    world.space.resolve_later([Run(Op.ZEROPAGE, BASE + 20 * PAGE, 20 * PAGE, 2 * PAGE)])
    serve(world, fault(20), fault(1))
    assert world.uffd.pages[BASE + 20 * PAGE] == bytes(PAGE)
    assert world.uffd.pages[BASE + PAGE] == content(PAGE, PAGE)


def test_faults_on_pages_that_are_present() -> None:
    """A write to a protected page is unprotected, a minor fault is continued: alone and among others."""
    for flags, name in ((FaultFlag.WP, "unprotects"), (FaultFlag.MINOR, "continues")):
        for messages in ((fault(3, flags),), (fault(3, flags), fault(9))):
            world = World(0, located=True)
            asked: list[Run] = []
            world.space.resolve = asked.extend  # type: ignore[method-assign,assignment]
            serve(world, *messages)
            (run,) = asked
            assert (run.dst, run.left, run.op) == (
                *(BASE + 3 * PAGE, PAGE),
                Op.UNPROTECT if name == "unprotects" else Op.CONTINUE,
            )
            found = world.counters.snapshot()
            assert (found.write_faults, found.minor_faults) == ((1, 0) if name == "unprotects" else (0, 1))


@pytest.mark.parametrize(
    ("page", "readahead", "length"), [(3, 16, 13), (16, 16, 16), (20, 64, 12), (20, 4, 4), (3, 0, 0)]
)
def test_the_neighbours_of_a_minor_fault_are_mapped_as_well(page: int, readahead: int, length: int) -> None:
    """From the page to the end of its block, within the mapping; the page alone where that is refused."""
    for refused in (None, 0, -errno.EFAULT):
        world, asked, alone = continued(readahead, refused)
        serve(world, fault(page, FaultFlag.MINOR))
        assert asked == ([(BASE + page * PAGE, length * PAGE, 0)] if length > 1 else [])
        assert [run.dst for run in alone] == ([BASE + page * PAGE] if refused is not None or length < 2 else [])
        assert world.counters.snapshot().continues == (1 if length > 1 else 0)


def continued(readahead: int, refused: int | None) -> tuple[World, list[tuple[int, int, int]], list[Run]]:
    """Return a world, the CONTINUEs that it is asked for, which it answers so, and the runs that come alone."""
    world = World(readahead * PAGE, located=True)
    asked: list[tuple[int, int, int]] = []
    alone: list[Run] = []

    def answer(*call: int) -> int:
        start, length, mode = call
        asked.append((start, length, mode))
        return length if refused is None else refused

    world.uffd.try_continue = answer  # type: ignore[method-assign,assignment]
    world.space.resolve = alone.extend  # type: ignore[method-assign,assignment]
    return world, asked, alone


def test_the_block_of_a_minor_fault_is_of_offsets_and_ends_with_its_mapping() -> None:
    """Wherever that begins; where nothing of the source is shown, the page comes alone. Each fault is counted."""
    world, asked, alone = continued(64, None)
    world.space.mappings = Mappings([Mapping(BASE + PAGE, BASE + 30 * PAGE, 0)])
    world.space.mappings.remove(BASE + 7 * PAGE, BASE + 9 * PAGE)
    serve(world, *(fault(page, FaultFlag.MINOR) for page in (4, 7, 10, 20)))
    assert asked == [(BASE + page * PAGE, length * PAGE, 0) for page, length in ((4, 3), (10, 7), (20, 10))]
    assert [run.dst for run in alone] == [BASE + 7 * PAGE]
    found = world.counters.snapshot()
    assert (found.minor_faults, found.continues) == (4, 3)


def test_a_backend_is_told_of_each_write() -> None:
    """Where, how, and by whom."""
    world = World(0, located=True)
    told: list[tuple[object, ...]] = []
    world.backend.written = lambda *arguments: told.append(arguments)  # type: ignore[method-assign]
    flags = FaultFlag.WP | FaultFlag.WRITE
    serve(world, fault(3, flags), fault(5, flags))
    assert told == [(world.space, BASE + page * PAGE, int(flags), 7) for page in (3, 5)]
    assert world.counters.snapshot().write_faults == 2


def test_a_space_that_is_being_left_poisons_what_is_touched() -> None:
    """Its owner decides on the rest."""
    world = World(0, located=True)
    world.space.refuse()
    serve(world, fault(3))
    serve(world, fault(4), fault(5))
    assert set(world.uffd.pages.values()) == {POISONED}
    assert len(world.uffd.pages) == 3


def test_a_child_is_served_like_its_parent() -> None:
    """With a copy of its mappings, and readahead that has seen nothing."""
    world = World(4 * PAGE, located=True)
    serve(world, fault(0))
    children: list[tuple[Space, Space]] = []
    world.space.on_child = lambda parent, child: children.append((parent, child))

    class Uffd:
        features = world.uffd.features

        @classmethod
        def from_fd(cls, fd: int, features: object) -> object:
            assert features is world.uffd.features
            return world.uffd if fd == 77 else None

        try_zeropage = try_continue = try_poison = try_writeprotect = None

    world.space.uffd = Uffd()  # type: ignore[assignment]
    world.space.write_protect = True
    world.space.on_gone = gone = lambda _: None
    told: list[tuple[object, ...]] = []
    world.backend.layout = lambda *event: told.append(event)  # type: ignore[method-assign]
    serve(world, event(abi.EVENT_FORK, abi.FORK_MESSAGE, 77))
    ((parent, child),) = children
    assert parent is world.space
    assert child.uffd.fileno() == world.uffd.fileno()
    assert list(child.mappings) == list(parent.mappings)
    assert child.mappings is not parent.mappings
    assert child.readahead.missing(0, SIZE) == [(0, SIZE)]
    assert child.readahead.limit == 4 * PAGE
    assert child.write_protect
    assert (child.backend, child.page_size, child.on_child) == (parent.backend, PAGE, parent.on_child)
    assert (child.on_error, child.on_gone, child.counters) == (parent.on_error, gone, parent.counters)
    assert world.counters.snapshot().forks == 1
    assert told == [(parent, abi.EVENT_FORK, event(abi.EVENT_FORK, abi.FORK_MESSAGE, 77), child)]
    serve(world, removed(3))
    assert told[1:] == [(parent, abi.EVENT_REMOVE, removed(3), None)]
