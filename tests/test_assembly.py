"""`engine.assembly`: the backend for what serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from engine_world import LOCATED, World, turns
from pattern import PAGE

from aiouffd.engine.assembly import make_backend, make_readahead
from aiouffd.engine.options import Options, Service
from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.handler import Handler
from aiouffd.engine.serve.handler_backend import HandlerBackend
from aiouffd.engine.serve.source import SourceBackend
from aiouffd.engine.statistics import Counters

if TYPE_CHECKING:
    from collections.abc import Iterable


class Recorder:
    """Notes offsets."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def note(self, offset: int, start: int, length: int) -> None:
        """Note it."""
        assert (start, length) == (offset, PAGE)
        self.offsets.append(offset)

    def note_pages(self, offsets: Iterable[int]) -> None:
        """Note them."""
        self.offsets.extend(offsets)


@pytest.mark.parametrize(("origin", "kind"), [(LOCATED, SourceBackend), (Handler(), HandlerBackend)])
async def test_a_backend_for_what_serves(origin: Any, kind: type) -> None:
    """With its limits and its recorder."""
    recorder: Any = Recorder()
    limits = Limits(concurrent_reads=3)
    backend = make_backend(Service(origin, recorder), Counters(), Options(limits=limits))
    assert type(backend) is kind
    world = World(0, source=origin)
    world.space.backend = backend
    world.space.readahead = make_readahead(PAGE, Options(0), local=True, recorder=recorder)
    world.touch(3, 1)
    world.serve_all()
    await turns()
    assert recorder.offsets == [3 * PAGE]
    assert not world.uffd.asleep
    if isinstance(backend, SourceBackend):
        assert backend.limits is limits
    else:
        assert backend._bound._value == 3
    assert type(make_backend(Service(origin), Counters(), Options())) is kind


@pytest.mark.parametrize(("local", "around"), [(True, 16 << 10), (False, 64 << 10)])
def test_what_is_near_comes_in_smaller_neighbourhoods(local: bool, around: int) -> None:
    """And the limit is the option's."""
    readahead = make_readahead(PAGE, Options(readahead=1 << 20), local=local)
    assert readahead.limit == 1 << 20
    assert readahead.windows(0, 0, 1 << 20) == [(0, around)]
