"""`testing.FakeUffd`: what a test of a handler asks of it. `test_contract` compares it with the kernel."""

from __future__ import annotations

import errno
import select

import pytest

import aiouffd
from aiouffd import Feature, RegisterMode
from aiouffd.kernel import abi
from aiouffd.kernel.memory import address_of
from aiouffd.testing import POISONED, FakeUffd

BASE = 0x10_0000


@pytest.fixture(params=[4096, 16 << 10, 64 << 10])
def fake(request: pytest.FixtureRequest) -> FakeUffd:
    """Eight registered pages, of each size that a machine may have."""
    made = FakeUffd(page_size=request.param)
    made.register(BASE, 8 * made.page_size, RegisterMode.MISSING)
    return made


def test_a_fault_is_read_and_resolved(fake: FakeUffd) -> None:
    """The address is that of the page, the bytes are those that were copied."""
    page = fake.page_size
    assert fake.touch(BASE + page + 5, thread=7) is None
    assert select.select([fake], [], [], 0)[0]
    assert fake.read() == [aiouffd.PageFault(BASE + page, aiouffd.FaultFlag(0), 7)]
    assert fake.copy(BASE + page, b"x" * page) == page
    assert fake.asleep == {}
    assert fake.touch(BASE + page) == b"x" * page
    assert fake.read() == []


def test_pages_have_the_machines_size(fake: FakeUffd) -> None:
    """Half a page is not aligned; a copy of two pages takes two."""
    page = fake.page_size
    with pytest.raises(aiouffd.OperationError, match="EINVAL"):
        fake.zeropage(BASE + page // 2, page)
    assert fake.try_copy(BASE, address_of(bytes(2 * page)), 2 * page, 0) == 2 * page
    assert sorted(fake.pages) == [BASE, BASE + page]
    assert fake.poison(BASE + 2 * page, page) == page
    assert fake.touch(BASE + 2 * page) is POISONED


def test_failures_come_first(fake: FakeUffd) -> None:
    """Each is answered by one operation, in order; 0 lets one through."""
    page = fake.page_size
    fake.failures.extend([-errno.EAGAIN, 0, -errno.ENOMEM])
    assert [fake.try_zeropage(BASE + n * page, page, 0) for n in range(4)] == [
        *(-errno.EAGAIN, page, -errno.ENOMEM, page),
    ]


def test_memory_that_is_emptied(fake: FakeUffd) -> None:
    """The pages go when REMOVE has been read; until then nothing can be resolved."""
    page = fake.page_size
    fake.zeropage(BASE, page)
    fake.madvise_dontneed(BASE, BASE + page)
    with pytest.raises(aiouffd.LayoutChangingError):
        fake.zeropage(BASE + page, page)
    assert BASE in fake.pages
    assert fake.read() == [aiouffd.Remove(BASE, BASE + page)]
    assert fake.pages == {}


def test_memory_that_moves_and_goes(fake: FakeUffd) -> None:
    """REMAP and UNMAP with addresses of whole pages; what nobody maps cannot be touched."""
    page = fake.page_size
    fake.copy(BASE, b"x" * page)
    fake.mremap(BASE, BASE + 64 * page, page)
    assert fake.read() == [aiouffd.Remap(BASE, BASE + 64 * page, page)]
    assert fake.read() == [aiouffd.Unmap(BASE, BASE + page)]
    assert fake.touch(BASE + 64 * page) == b"x" * page
    fake.munmap(BASE + page, BASE + 3 * page)
    assert fake.read() == [aiouffd.Unmap(BASE + page, BASE + 3 * page)]
    with pytest.raises(MemoryError):
        fake.touch(BASE + page)
    assert fake.mappings == [(BASE + 3 * page, BASE + 8 * page), (BASE + 64 * page, BASE + 65 * page)]


def test_without_features_nothing_is_told() -> None:
    """No thread number, no layout events."""
    with FakeUffd(Feature(0)) as fake:
        fake.register(BASE, 4 * fake.page_size, RegisterMode.MISSING)
        fake.touch(BASE, thread=9)
        fake.madvise_dontneed(BASE + fake.page_size, BASE + 2 * fake.page_size)
        assert fake.read() == [aiouffd.PageFault(BASE, aiouffd.FaultFlag(0), 0)]


def test_the_process_ends(fake: FakeUffd) -> None:
    """ESRCH, and `gone()`."""
    fake.touch(BASE)
    fake.exit()
    assert fake.gone()
    assert fake.read() == []
    with pytest.raises(aiouffd.TargetExitedError):
        fake.copy(BASE, bytes(fake.page_size))
    with pytest.raises(aiouffd.OperationError, match="ENOMEM"):
        fake.unregister(BASE, fake.page_size)


def test_what_is_no_operation_for_this_memory(fake: FakeUffd) -> None:
    """It is anonymous, and registered for missing pages only."""
    with pytest.raises(aiouffd.OperationError, match="EINVAL"):
        fake.continue_(BASE, fake.page_size)
    with pytest.raises(aiouffd.OperationError):
        fake.writeprotect(BASE, fake.page_size, protect=True)
    assert fake.try_copy(BASE, address_of(bytes(fake.page_size)), fake.page_size, abi.COPY_MODE_WP) == -errno.EINVAL
    with pytest.raises(aiouffd.OperationError, match="EINVAL"):
        fake.register(BASE, fake.page_size, RegisterMode.WP)


def test_closing_lets_sleepers_read_zeros(fake: FakeUffd) -> None:
    """As the kernel does when the last descriptor is closed."""
    fake.touch(BASE)
    fake.close()
    assert fake.asleep == {}
    assert fake.touch(BASE) == bytes(fake.page_size)
