"""`monitor.engines.protecting`: kernels before Linux 6.6, of which UFFDIO_POISON is taken away here."""

from __future__ import annotations

import asyncio
import errno
import signal

from pattern import PAGE, peek, word
from scenario import play

import aiouffd
from aiouffd.engine.resolver import DONTWAKE
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.userfaultfd import kernel_features
from aiouffd.monitor import registration
from aiouffd.monitor.engines.protecting import ProtectingUserfaultfd

SIZE = 1 << 20


class Broken:
    """Has no page below the tenth."""

    size = SIZE

    async def read(self, offset: int, length: int) -> bytes:
        """Fail, or return the pattern."""
        if offset < 10 * PAGE:
            raise aiouffd.SourceError("Broken", offset, length, "no such page")
        return word(offset // PAGE) * (length // 8)


async def touched() -> None:
    """Scenario: a thread touches a page that cannot be had."""
    lacking = kernel_features() & ~Feature.POISON
    vars(registration)["kernel_features"] = lambda: lacking
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Broken(), readahead=0, retries=0, engine=aiouffd.InProcess()):
        assert await asyncio.to_thread(peek, region.address + 20 * PAGE) == word(20)
        print("so far", flush=True)
        await asyncio.to_thread(peek, region.address + 3 * PAGE)


def test_a_page_that_cannot_be_had() -> None:
    """The thread that touched it gets SIGSEGV and does not wait for ever; the log says why."""
    output, errors = play(touched, status=-signal.SIGSEGV)
    assert output == "so far\n"
    assert "cannot be had, and this kernel has no UFFDIO_POISON" in errors
    assert "in peek" in errors


def test_as_the_kernel_answers() -> None:
    """A present page is EEXIST; a missing one is inaccessible, and registered until its sleepers are woken."""
    region = aiouffd.Region(4 * PAGE)
    with ProtectingUserfaultfd() as uffd:
        uffd.register(region.address, 4 * PAGE, RegisterMode.MISSING)
        uffd.zeropage(region.address, PAGE)
        assert uffd.try_poison(region.address, PAGE, 0) == -errno.EEXIST
        assert region[0] == 0
        assert uffd.try_poison(region.address + PAGE, PAGE, DONTWAKE) == PAGE
        assert uffd.try_poison(region.address + PAGE, PAGE, 0) == PAGE
        assert uffd.try_zeropage(region.address + PAGE, PAGE, 0) == -errno.ENOENT
        assert uffd.try_zeropage(region.address + 2 * PAGE, PAGE, 0) == PAGE
    region.close()
