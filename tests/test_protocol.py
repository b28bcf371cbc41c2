"""What all engines have in common."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import attrs
import pytest

import aiouffd
from aiouffd import native
from aiouffd.engine.options import Options
from aiouffd.kernel.abi import LAYOUT_EVENTS, Feature
from aiouffd.monitor.engines.protocol import Engine, EngineChoice, Terms, positive_or_none

if TYPE_CHECKING:
    from collections.abc import Callable

native.reason()  # the native part is loaded once a process, and reads files for that
CHOICES: list[EngineChoice] = [aiouffd.Pager(), aiouffd.InThread(), aiouffd.InProcess(), aiouffd.ServedBy("/run/x")]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: type(choice).__name__)
async def test_each_choice_makes_an_engine(choice: EngineChoice) -> None:
    """With all that a Monitor asks of one; it serves nothing yet."""
    engine: Engine = choice.make(asyncio.get_running_loop())
    for name in ("start", "prefetch", "check_may_wait", "refuse", "leave", "statistics"):
        assert callable(getattr(engine, name))
    assert all(isinstance(pid, int) for pid in getattr(engine, "pids", ()))


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: type(choice).__name__)
def test_a_choice_is_a_value(choice: EngineChoice) -> None:
    """It can be used for several Monitors, so nothing changes it."""
    assert attrs.evolve(choice) == choice  # type: ignore[misc]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        choice.stuck_limit = 1.0  # type: ignore[attr-defined]


def test_the_kernel_tells_of_layout_changes_where_no_thread_of_this_process_would_wait_for_itself() -> None:
    """A thread that causes an event sleeps until it is read; in this process it may have the GIL then."""
    events = {type(choice).__name__: bool(choice.features & LAYOUT_EVENTS) for choice in CHOICES}
    assert events == {"Pager": True, "InThread": False, "InProcess": False, "ServedBy": True}
    assert [type(choice).__name__ for choice in CHOICES if Feature.SIGBUS in choice.features] == ["InThread"]
    assert [type(choice).__name__ for choice in CHOICES if not choice.serves_system_calls] == ["InThread"]


class Writes(aiouffd.Handler):
    """Is to be told of writes."""

    async def write(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Allow it."""
        batch.unprotect(fault.page)


@pytest.mark.parametrize(
    ("choice", "terms", "words"),
    [
        (aiouffd.InThread(), Terms(None, "serve", Options()), r"InThread.*fork=\"serve\""),
        (aiouffd.InThread(), Terms(Writes(), "dontfork", Options()), r"InThread.*Handler\.write"),
        (aiouffd.ServedBy("x"), Terms(aiouffd.ZeroSource(1), "dontfork", Options()), r"ServedBy.*no source or handler"),
        (aiouffd.ServedBy("x"), Terms(None, "dontfork", Options(), records=True), r"ServedBy.*record"),
        (aiouffd.ServedBy("x"), Terms(None, "dontfork", Options(), replays=True), r"ServedBy.*replay"),
        (aiouffd.ServedBy("x"), Terms(None, "dontfork", Options(background=1.0)), r"ServedBy.*background"),
        (aiouffd.ServedBy("x"), Terms(None, "dontfork", Options(readahead=0)), r"ServedBy.*readahead"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(choice: EngineChoice, terms: Terms, words: str) -> None:
    """The error names the engine, and what it was asked for."""
    with pytest.raises(ValueError, match=words):
        choice.check(terms)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: type(choice).__name__)
def test_what_an_engine_can_do_is_accepted(choice: EngineChoice) -> None:
    """A Monitor at its defaults goes with each."""
    choice.check(Terms(None, "dontfork", Options()))


def test_in_process_needs_a_loop() -> None:
    """A plain `with` has none."""
    with pytest.raises(TypeError, match="async with"):
        aiouffd.InProcess().make(None)


@pytest.mark.parametrize("make", [aiouffd.Pager, aiouffd.InThread, aiouffd.InProcess])
def test_seconds_are_positive(make: Callable[..., object]) -> None:
    """Or there is no limit."""
    make(stuck_limit=None)
    for value in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="stuck_limit"):
            make(stuck_limit=value)
    positive_or_none(None, attrs.fields(aiouffd.Pager).stuck_limit, 0.1)
