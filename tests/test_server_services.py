"""`server.services` without a server: openings that hang, and what clients share."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock

import pytest
from pattern import PAGE
from scenario import eventually

from aiouffd.engine.mappings import Mapping
from aiouffd.engine.options import Options
from aiouffd.engine.serve.bounds import Limits
from aiouffd.errors import HandoffError, SourceError
from aiouffd.handoff.arrival import Handoff
from aiouffd.handoff.firecracker import Regions
from aiouffd.handoff.receive import Peer
from aiouffd.server import services
from aiouffd.server.services import Services, Settings
from aiouffd.sources.buffer import BufferSource

if TYPE_CHECKING:
    from collections.abc import Callable

PEER = Peer(5, 0, 0)


def handoff(pages: int = 1, page_size: int = PAGE) -> Handoff:
    """Return one without a descriptor, which is not looked at."""
    regions = Regions((Mapping(1 << 30, (1 << 30) + pages * page_size, 0),), page_size, None)
    return Handoff(PEER, regions, uffd=None)  # type: ignore[arg-type]


def made(origin: Any, timeout: float | None = 0.05) -> Services:
    """Return services with a short timeout."""
    options = Options(limits=Limits(128, 1 << 20, timeout, 0))
    return Services(origin, Settings(options=options))


async def test_openings_that_hang_are_bounded_for_each_name() -> None:
    """Each gives up after the timeout; of too many the next is refused at once, until one has ended. Others go on."""
    go = threading.Event()

    def choose(*asked: Any) -> BufferSource:
        if asked[2] == "far":
            go.wait(60)
        return BufferSource(bytes(PAGE))

    found = made(choose)
    taking = [found.take(handoff(), number, "far") for number in range(services._MAX_HANGING)]
    results = await asyncio.gather(*taking, return_exceptions=True)
    assert all("could not be opened within 0.05 s" in str(result) for result in results)
    with pytest.raises(HandoffError, match="8 openings of it hang"):
        await found.take(handoff(), 9, "far")
    found._options = made(choose, timeout=None)._options  # a busy machine opens slowly, too
    found.release(await found.take(handoff(), 10, "near"))
    go.set()
    while found._hanging:  # noqa: ASYNC110 - threads end
        await asyncio.sleep(0.01)
    found.release(await found.take(handoff(), 11, "far"))


async def test_a_client_that_holds_the_lock_of_its_memory_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is turned away after the timeout; what was to serve it is let go when the look ends."""
    go, found = threading.Event(), made(BufferSource(bytes(PAGE)), timeout=None)
    share = found._share
    monkeypatch.setattr(found, "_share", lambda *asked: share(*asked) if go.wait(60) else None)
    opened = await found._open(PEER, 1, "", handoff())
    monkeypatch.setattr(found, "_open", AsyncMock(return_value=opened))
    found._options = made(BufferSource(bytes(PAGE)))._options
    with pytest.raises(HandoffError, match=r"could not be looked at within 0.05 s"):
        await found.take(handoff(), 1, "")
    assert found._hanging == {PEER: 1}
    go.set()
    while found._hanging:  # noqa: ASYNC110 - a thread ends
        await asyncio.sleep(0.01)
    assert not found._uses


def fail(error: Exception) -> Callable[..., Any]:
    """Return a function that raises."""

    def choose(*_: object) -> Any:
        raise error

    return choose


@pytest.mark.parametrize(
    ("origin", "kind", "words"),
    [
        (fail(SourceError("x", 0, 0, "is not there")), SourceError, "is not there"),
        (fail(FileNotFoundError(2, "No such file", "x")), FileNotFoundError, "No such file"),
        (fail(ValueError("no such name")), HandoffError, "no such name"),
        (fail(ZeroDivisionError("division")), HandoffError, "no source could be found for it"),
        (lambda *_: "a path", HandoffError, "no source could be found for it"),
        (lambda *_: BufferSource(bytes(PAGE)), HandoffError, "reaches to offset"),
    ],
)
async def test_what_cannot_be_served(origin: Any, kind: type[Exception], words: str) -> None:
    """Each has its reason, for the client too."""
    with pytest.raises(kind, match=words):
        await made(origin, timeout=None).take(handoff(pages=2), 1, "")


async def test_what_is_shared() -> None:
    """Clients of the same source and page size; it is let go with the last of them."""
    source = BufferSource(bytes(4 << 20))
    found = made(source, timeout=None)
    one, two = await asyncio.gather(found.take(handoff(), 1, ""), found.take(handoff(), 2, ""))
    other = await found.take(handoff(page_size=2 << 20), 3, "")
    assert one is two
    assert other is not one
    found.release(one)
    assert not one.config.closed
    found.release(two)
    found.release(other)
    await asyncio.to_thread(eventually, lambda: (one.config.closed, other.config.closed), (True, True))
    again = await found.take(handoff(), 4, "")
    assert again is not one
    found.release(again)


async def test_a_name_where_there_is_one_source() -> None:
    """The client that asks for it learns that it would get something else."""
    found = made(BufferSource(bytes(PAGE)), timeout=None)
    with pytest.raises(HandoffError, match="asks for the source 'weights': this server has one, without a name"):
        await found.take(handoff(), 0, "weights")
    found.release(await found.take(handoff(), 1, ""))
