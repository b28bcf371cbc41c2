"""`engine.forsaking`: nobody waits for ever in a space that cannot be read, and nobody reads zeros."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Any

import pytest
from engine_world import BASE, PAGES, PipedUffd, World
from pattern import PAGE, content

from aiouffd.engine import forsaking as module
from aiouffd.engine.forsaking import forsake
from aiouffd.errors import ClosedError
from aiouffd.testing import POISONED


def emptied_at_once(world: World) -> None:
    """Have two pages there, one unmapped, and threads asleep on three, whose messages nobody reads."""
    for page in (3, 4):
        data = content(page * PAGE, PAGE)
        assert world.uffd.copy(BASE + page * PAGE, data) == PAGE
    for thread, page in enumerate((0, 5, PAGES - 1)):
        world.touch(page, thread)


def states(world: World) -> list[bytes | None]:
    """Return the beginning of each page."""
    return [(world.uffd.pages.get(BASE + page * PAGE) or b"")[:8] or None for page in range(PAGES)]


async def test_what_is_missing_is_poisoned() -> None:
    """What is there stays. Nobody sleeps, and nothing is registered any more."""
    world = World(0)
    emptied_at_once(world)
    expected: list[Any] = [POISONED] * PAGES
    expected[3], expected[4] = content(3 * PAGE, 8), content(4 * PAGE, 8)
    assert await forsake(world.space)
    assert states(world) == expected
    assert not world.uffd.asleep
    assert world.uffd.mappings == []
    world.space.close()


async def test_what_is_no_longer_mapped_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The space has not read of it. The kernel refuses a piece with more than one mapping."""
    monkeypatch.setattr(module, "_PIECE", 16 * PAGE)
    world = World(0)
    world.uffd.munmap(BASE + 6 * PAGE, BASE + 9 * PAGE)
    world.uffd.read_raw()  # by somebody else
    assert await forsake(world.space)
    assert states(world) == [*[POISONED] * 6, *[None] * 3, *[POISONED] * (PAGES - 9)]
    assert world.uffd.mappings == []
    world.space.close()


async def test_what_the_kernel_puts_off_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it does."""
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    world = World(0)
    world.uffd.failures.extend([-errno.EAGAIN, -errno.ENOMEM])
    assert await forsake(world.space)
    assert states(world) == [POISONED] * PAGES
    world.space.close()


async def test_its_process_ends() -> None:
    """Nothing is owed to it any more."""
    world = World(0)
    world.uffd.failures.append(-errno.ESRCH)
    assert await forsake(world.space)
    assert world.space.is_gone
    world.space.close()


async def test_a_kernel_that_cannot_poison(caplog: pytest.LogCaptureFixture) -> None:
    """It stays registered: its threads wait, and read no zeros."""
    logging.getLogger("aiouffd").propagate = True
    world = World(0)
    world.touch(1, 1)
    world.uffd.failures.append(-errno.EINVAL)
    assert not await forsake(world.space)
    assert "cannot be poisoned (UFFDIO_POISON: Linux 6.6)" in caplog.text
    assert world.uffd.asleep
    world.space.close()


async def test_it_is_closed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its owner, who has settled it."""
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    world = World(0, uffd=PipedUffd())
    world.uffd.failures.append(-errno.EAGAIN)
    forsaking = asyncio.create_task(forsake(world.space))
    await asyncio.sleep(0)
    world.space.close()
    with pytest.raises(ClosedError):
        await forsaking
