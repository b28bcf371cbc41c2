"""`blocked`: what blocks a worker's loop is named, and interrupted so that only its page fails."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

import aiouffd
from aiouffd.pager.process.blocked import Blocked


class Mine(aiouffd.Handler):
    """A handler."""


def serving(origin: object, task: object) -> Blocked:
    """Return one for a worker that serves one flight by that task."""
    flight = SimpleNamespace(done=task, offset=4096, start=4096, end=8192)
    space = SimpleNamespace(identity=3, flights=[flight])
    tenancy = SimpleNamespace(origin=SimpleNamespace(service=SimpleNamespace(origin=origin)))
    served: Any = SimpleNamespace(dispatcher=SimpleNamespace(spaces={3: space}), tenancies={3: tenancy})
    return Blocked(served)


async def test_a_source_is_named_and_its_page_fails(caplog: pytest.LogCaptureFixture) -> None:
    """The error is a SourceError for what it was given."""
    blocked = serving(aiouffd.ZeroSource(1), asyncio.current_task())
    with caplog.at_level(logging.ERROR):
        blocked.say()
    assert "ZeroSource" in caplog.text
    assert "blocks the event loop" in caplog.text
    with pytest.raises(aiouffd.SourceError, match="was interrupted") as caught:
        blocked.interrupt()
    assert (caught.value.offset, caught.value.length) == (4096, 4096)


async def test_a_handler_is_interrupted_where_it_is() -> None:
    """It may clean up: RuntimeError passes through its code."""
    with pytest.raises(RuntimeError, match="was interrupted"):
        serving(Mine(), asyncio.current_task()).interrupt()


async def test_what_is_not_running_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The loop is in another task: nothing is said, nothing is raised."""
    blocked = serving(Mine(), object())
    blocked.say()
    blocked.interrupt()
    assert not caplog.text
