"""`engine.others`: who else has messages on a loop, and has had faults."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from engine_world import BASE, LOCATED, PipedUffd, World
from pattern import PAGE

from aiouffd import native
from aiouffd.engine import dispatcher as module
from aiouffd.engine.common_file import CommonFile
from aiouffd.engine.dispatcher import Dispatcher
from aiouffd.engine.others import Others
from aiouffd.engine.reading import PythonReader
from aiouffd.engine.runs import Op, Run
from aiouffd.engine.statistics import Counters

if TYPE_CHECKING:
    from collections.abc import Callable

Make: TypeAlias = "Callable[..., tuple[World, PipedUffd]]"

LATER = 1 << 62
native.reason()  # the native part is loaded once a process, and reads files for that


@pytest.fixture(params=["native", "python"])
async def worlds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what makes worlds that one dispatcher serves, with either reader, and their descriptors."""
    if request.param == "python":
        monkeypatch.setattr(module, "make_reader", PythonReader)
    dispatcher = Dispatcher(asyncio.get_running_loop(), Counters(), spin_us=0)

    def make(*, located: bool = True) -> tuple[World, PipedUffd]:
        uffd = PipedUffd()
        world = World(0, uffd=uffd, located=located)
        dispatcher.add(world.space)
        return world, uffd

    yield make
    dispatcher.close()


async def turns() -> None:
    """Let the loop read what can be read."""
    for _ in range(10):
        await asyncio.sleep(0.001)


def test_who_is_alone_has_no_others() -> None:
    """Before a dispatcher has the space."""
    space = World(0).space
    assert (space.others.wait([space]), space.others.serve((), LATER), space.others.turns(())) == (None, None, {})
    assert isinstance(space.others, Others)


async def test_others_wait_where_nothing_is_brought_for_them(worlds: Make) -> None:
    """As long as their messages are unread."""
    (quiet, its), (filled, also), (other, _) = (worlds() for _ in range(3))
    brought = [filled.space, other.space]
    assert quiet.space.others.wait([quiet.space, *brought]) is None
    assert quiet.space.others.wait(brought) is False
    for world, uffd in ((filled, also), (quiet, its)):
        world.touch(1, 1)
        uffd.send()
        assert filled.space.others.wait(brought) is (uffd is its)
    await turns()
    assert its.pages
    assert filled.space.others.wait(brought) is False


@pytest.mark.parametrize("located", [True, False])
async def test_others_are_served_in_the_midst_of_a_step(worlds: Make, located: bool) -> None:
    """A turn at once, plain faults or not, and none of those for which something is brought."""
    those = [worlds(located=located) for _ in range(3)]
    (filled, also), (quiet, its), (storm, many) = those
    brought = [filled.space]
    assert filled.space.others.serve([world.space for world, _ in those], LATER) is None
    assert filled.space.others.serve(brought, LATER) is False
    for page in range(6):
        filled.touch(page, page)
        storm.touch(page, page)
    quiet.touch(3, 3)
    for uffd in (also, its, many):
        uffd.send()

    def served() -> list[int]:
        return [len(uffd.pages) + len(list(world.space.flights)) for world, uffd in those]

    assert filled.space.others.serve(brought, LATER) is True  # of the storm
    assert served() == [0, 1, 4]
    assert filled.space.others.serve(brought, LATER) is False
    assert served() == [0, 1, 6]
    await turns()
    assert served() == [6, 1, 6]


async def test_memory_that_others_show_is_not_read_in_the_midst_of_a_step(worlds: Make) -> None:
    """It would be emptied as soon as that is read, and what the step places would be there behind that."""
    (filled, _), (other, its) = worlds(), worlds()
    other.space.file = CommonFile("a memfd").enter(other.space)
    other.touch(1, 1)
    other.remove(8, 2)
    its.send()
    assert filled.space.others.serve([filled.space], LATER) is True
    assert other.space.mappings.locate(BASE + 8 * PAGE)[2] >= 0
    await turns()
    assert its.pages


async def test_others_that_have_had_messages_are_known(worlds: Make) -> None:
    """Each by itself, though all clients of a session are counted together: who is brought for has faults as well."""
    (filled, also), (quiet, its) = worlds(), worlds()
    before = filled.space.others.turns([filled.space])
    assert list(before) == [its.fileno()]
    filled.touch(1, 1)
    also.send()
    await turns()
    assert also.pages
    assert filled.space.others.turns([filled.space]) == before
    for page in range(2):
        quiet.touch(page, 1)
        its.send()
        await turns()
        after = filled.space.others.turns([filled.space])
        assert after != before
        before = after
    assert list(filled.space.others.turns(())) == [also.fileno(), its.fileno()]


async def test_who_serves_others_stops_when_the_loop_is_due_for_a_turn(worlds: Make) -> None:
    """However many have messages: each may take long."""
    filled, *others = [worlds() for _ in range(4)]
    for world, uffd in others:
        world.touch(1, 1)
        uffd.send()
    assert filled[0].space.others.serve([filled[0].space], 0) is True
    assert sum(len(uffd.pages) for _, uffd in others) == 1
    await turns()
    assert all(uffd.pages for _, uffd in others)


async def test_the_rest_of_a_window_of_others_comes_without_a_further_message(
    worlds: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the dispatcher has not read what asked for it in its own turn."""
    (filled, _), (other, its) = worlds(), worlds()
    window = Run(Op.COPY, BASE, 0, 8 * PAGE, LOCATED.address)
    monkeypatch.setattr(other.backend, "serve", lambda space, *_: space.resolve_later([window]))
    other.touch(1, 1)
    its.send()
    assert filled.space.others.serve([filled.space], LATER) is False
    assert not its.pages
    await turns()
    assert len(its.pages) == 8


async def test_a_defect_of_others_costs_no_step(worlds: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the loop's, as if it had been met in a turn of its own."""
    (filled, _), (other, its) = worlds(), worlds()
    found: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))

    def defect(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(module, "serve_messages", defect)
    other.touch(1, 1)
    its.send()
    assert filled.space.others.serve([filled.space], LATER) is False
    assert [str(context["exception"]) for context in found] == ["a defect"]
