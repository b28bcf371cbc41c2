"""`engine.forsaking`, against the kernel: the engine cannot read the descriptor any more."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any

import pytest
from pattern import PAGE, Pattern, peek, word
from scenario import play

import aiouffd
from aiouffd.engine import reading

SIZE = 4 << 20
ENGINES: dict[str, Any] = {"pager": aiouffd.Pager, "in_process": aiouffd.InProcess}


class Breaks(Pattern):
    """With its page 5, whoever serves it can read no more messages."""

    def read_nowait(self, offset: int, length: int) -> bytes:
        """Return bytes."""
        if offset == 5 * PAGE:
            reading._preadv = refuse
        return super().read_nowait(offset, length)


class BreaksLate(Pattern):
    """The same with its last page but one."""

    def read_nowait(self, offset: int, length: int) -> bytes:
        """Return bytes."""
        if offset == SIZE - 2 * PAGE:
            reading._preadv = refuse
        return super().read_nowait(offset, length)


def refuse(*_: Any) -> int:
    """Fail as no read of a userfaultfd does."""
    raise OSError(errno.EIO, "broken")


async def unreadable(engine: str) -> None:
    """Scenario: a system call waits for a page whose message cannot be read, and others touch pages later."""
    os.environ["AIOUFFD_NATIVE"] = "0"
    region, (_, pipe) = aiouffd.Region(SIZE), os.pipe()
    view = memoryview(region)
    async with aiouffd.Monitor(region, Breaks(SIZE), engine=ENGINES[engine](), readahead=0) as monitor:
        for page in (1023, 5):
            assert await asyncio.to_thread(peek, region.address + page * PAGE) == word(page)
        for page in (9, 600, 0):
            with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
                await asyncio.to_thread(os.write, pipe, view[page * PAGE : (page + 1) * PAGE])
        with pytest.raises(aiouffd.OperationError, match=os.strerror(errno.EIO)):
            await monitor.wait_error()
        assert peek(region.address + 5 * PAGE) == word(5)
        assert peek(region.address + 1023 * PAGE) == word(1023)
    with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
        os.write(pipe, view[:PAGE])
    view.release()


@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_waits_where_messages_cannot_be_read(engine: str) -> None:
    """Missing pages are SIGBUS, and EFAULT of a system call; what is there stays, and the owner hears why."""
    play(unreadable, engine)


async def unreadable_and_bounded() -> None:
    """Scenario: pages have been dropped of shared memory, which leaves a marker of their protection."""
    os.environ["AIOUFFD_NATIVE"] = "0"
    region, (_, pipe) = aiouffd.Region(SIZE, shared=True), os.pipe()
    view = memoryview(region)
    async with aiouffd.Monitor(region, BreaksLate(SIZE), readahead=0, max_resident=SIZE // 4) as monitor:
        for page in range(SIZE // PAGE - 1):
            assert await asyncio.to_thread(peek, region.address + page * PAGE) == word(page)
        assert monitor.statistics().pages_evicted
        with pytest.raises(aiouffd.OperationError, match=os.strerror(errno.EIO)):
            await monitor.wait_error()
        for page in (0, 1, SIZE // PAGE - 1):
            with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
                await asyncio.to_thread(os.write, pipe, view[page * PAGE : (page + 1) * PAGE])
        assert peek(region.address + SIZE - 2 * PAGE) == word(SIZE // PAGE - 2)
    view.release()


def test_what_was_dropped_is_missing_as_well() -> None:
    """It is no page that is there, and is not read as zeros."""
    play(unreadable_and_bounded)
