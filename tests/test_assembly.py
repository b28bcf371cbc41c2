"""`engine.assembly`: what serves, and its options."""

from __future__ import annotations

from typing import Any

import pytest
from engine_world import LOCATED, World, turns
from pattern import PAGE

from aiouffd.engine.assembly import Options, Service, checked, make_backend, make_readahead
from aiouffd.engine.serve.handler import Handler, HandlerBackend
from aiouffd.engine.serve.reads import Limits
from aiouffd.engine.serve.source import SourceBackend
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.abi import RegisterMode


@pytest.mark.parametrize("origin", [LOCATED, Handler()])
def test_what_can_serve(origin: Any) -> None:
    """Is returned as it is."""
    assert checked(origin) is origin


@pytest.mark.parametrize("origin", [Handler, type(LOCATED), object(), bytes(1 << 20), None])
def test_what_cannot_serve(origin: Any) -> None:
    """Classes in place of instances, bytes, nothing; the text does not repeat a megabyte."""
    with pytest.raises(TypeError, match="is no Source and no Handler") as raised:
        checked(origin)
    assert len(str(raised.value)) < 300


def test_a_large_buffer_is_named_by_its_beginning() -> None:
    """Its representation has four characters a byte."""
    with pytest.raises(TypeError, match="is no Source and no Handler") as caught:
        checked(bytes(1 << 20))
    assert len(str(caught.value)) < 400


class Recorder:
    """Notes offsets."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def note(self, offset: int) -> None:
        """Note it."""
        self.offsets.append(offset)


@pytest.mark.parametrize(("origin", "kind"), [(LOCATED, SourceBackend), (Handler(), HandlerBackend)])
async def test_a_backend_for_what_serves(origin: Any, kind: type) -> None:
    """With its limits and its recorder."""
    recorder: Any = Recorder()
    limits = Limits(concurrent_reads=3)
    backend = make_backend(Service(origin, recorder), Counters(), Options(limits=limits))
    assert type(backend) is kind
    world = World(0, source=origin)
    world.space.backend = backend
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


def test_options() -> None:
    """Defaults, and what is refused."""
    options = Options()
    assert (options.readahead, options.spin_us, options.background, options.write_protect) == (2 << 20, 50, 0.0, False)
    assert options.modes == RegisterMode.MISSING
    assert options.limits == Limits()
    for wrong in ({"readahead": -1}, {"spin_us": -1}, {"background": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Options(**wrong)
