"""`monitor.engines.local`: what engines share that serve a region on a loop of their own process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Pattern, Slow, word

import aiouffd
from aiouffd import native
from aiouffd.engine.mappings import Mapping
from aiouffd.engine.options import Options, Service
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.abi import RegisterMode
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.monitor.engines.local import Local
from aiouffd.monitor.engines.protocol import Assignment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.kernel.region import LayoutChange
    from aiouffd.monitor.engines.layout import Layout

SIZE = 16 * PAGE
native.reason()  # the library is loaded, as engines do before they run a loop


@contextlib.contextmanager
def local(source: Any, counters: Counters, errors: list[BaseException], **layout: Any) -> Iterator[tuple[Any, Local]]:
    """Serve a region on the running loop."""
    region = aiouffd.Region(SIZE)
    with Userfaultfd() as uffd:
        uffd.register(region.address, SIZE, RegisterMode.MISSING)
        assignment = Assignment(
            uffd,
            Service(source),
            Mapping(region.address, region.address + SIZE, 0),
            PAGE,
            Options(),
            True,
            errors.append,
            print,
        )
        own = Userfaultfd.from_fd(os.dup(uffd.fileno()), uffd.features)
        one = Local(asyncio.get_running_loop(), assignment, own, counters, spin_us=0, **layout)
        one.begin()
        yield region, one
        uffd.unregister(region.address, SIZE)
    region.close()


async def test_it_serves_until_it_is_closed() -> None:
    """A prefetch brings the bytes; one that is under way when it is closed raises ClosedError."""
    counters = Counters()
    with local(Pattern(SIZE), counters, []) as (region, one):
        await asyncio.wrap_future(one.prefetch([(0, SIZE)]))
        assert region[5 * PAGE : 5 * PAGE + 8] == word(5)
        assert counters.snapshot().pages_prefetch == 16
        await one.aclose()
    with local(Slow(SIZE, 1000.0), counters, []) as (region, one):
        future = one.prefetch([(0, SIZE)])
        while not counters.snapshot().in_flight:  # noqa: ASYNC110 - a counter is not an event
            await asyncio.sleep(0.001)
        await one.aclose()
        with pytest.raises(aiouffd.ClosedError):
            await asyncio.wrap_future(future)


async def test_the_layout_is_changed_in_quiet() -> None:
    """The block that keeps others away is entered for a change, and left after what changed was told."""
    seen: list[str] = []

    @contextlib.contextmanager
    def quiet(layout: Layout) -> Iterator[None]:
        seen.append("quiet")
        yield
        seen.append("not quiet" if layout is one.layout else "another")

    def changed(layout: Layout) -> None:
        seen.append("changed" if layout is one.layout else "another")

    with local(Pattern(SIZE), Counters(), [], quiet=quiet, changed=changed) as (_, one):

        def work(change: LayoutChange) -> None:
            seen.append("work")
            change.removed(0, PAGE)

        one.layout.change(work)
        assert seen == ["quiet", "work", "changed", "not quiet"]
        await asyncio.wrap_future(one.prefetch([(0, SIZE)]))
        assert not one.layout.may_wait
        assert await asyncio.to_thread(lambda: one.layout.may_wait)
        await one.aclose()


async def test_why_a_page_cannot_be_had_is_said_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """On standard error; where that is closed, its number may be that of another file."""
    errors: list[BaseException] = []
    with local(Pattern(SIZE), Counters(), errors) as (_, one):
        one.space.report(aiouffd.SourceError("Lacks", 0, PAGE, "no such page"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", None)
            one.space.report(aiouffd.SourceError("Lacks", 0, PAGE, "not said"))
        await one.aclose()
    assert capfd.readouterr().err == f"aiouffd[{os.getpid()}]: Lacks [0, {PAGE}): no such page\n"
    assert len(errors) == 2
