"""Protection against any access (Linux 7.3): run by `boot.py` on such a kernel."""

from __future__ import annotations

import select
import threading

import pytest
from pattern import PAGE, peek

import aiouffd
from aiouffd import FaultFlag, FaultKind, Feature, Ioctl, PageFault, Region, RegisterMode, Userfaultfd
from aiouffd.kernel import abi
from aiouffd.kernel.pagemap import Pagemap

PAGES = 8

pytestmark = pytest.mark.skipif(Feature.RWP not in aiouffd.probe().features, reason="before Linux 7.3 there is no RWP")


@pytest.fixture(params=[False, True])
def region(request: pytest.FixtureRequest) -> Region:
    """Memory, private and shared, that is present and holds the numbers of its pages."""
    made = Region(PAGES * PAGE, shared=request.param)
    for page in range(PAGES):
        made[page * PAGE] = page
    return made


def accessed(region: Region) -> list[int]:
    """Return the pages that were accessed since they were protected."""
    with Pagemap() as pagemap:
        found = pagemap.scan(region.address, region.mapped_length, mask=abi.PAGE_IS_ACCESSED | abi.PAGE_IS_PRESENT)
    return [(at - region.address) // PAGE for item in found for at in range(item.start, item.end, PAGE)]


def test_an_access_to_a_protected_page_is_reported(region: Region) -> None:
    """Reading and writing: a message each, and the thread waits until the protection is lifted."""
    with Userfaultfd(Feature.RWP) as uffd:
        assert uffd.register(region.address, PAGES * PAGE, RegisterMode.RWP) & Ioctl.RWPROTECT
        uffd.rwprotect(region.address, PAGES * PAGE, protect=True)
        got: list[bytes] = []
        thread = threading.Thread(target=lambda: got.append(peek(region.address + 3 * PAGE, 1)))
        thread.start()
        assert select.select([uffd], [], [], 10)[0]
        (fault,) = uffd.read()
        assert isinstance(fault, PageFault)
        assert (fault.address, fault.kind, fault.write) == (region.address + 3 * PAGE, FaultKind.RWP, False)
        assert FaultFlag.RWP in fault.flags
        assert thread.is_alive()
        uffd.rwprotect(region.address + 3 * PAGE, PAGE, protect=False)
        thread.join()
        assert got == [b"\3"]
        uffd.rwprotect(region.address, PAGES * PAGE, protect=False)
        assert region[5 * PAGE] == 5


def test_the_kernel_lifts_the_protection_itself(region: Region) -> None:
    """RWP_ASYNC brings RWP: nobody reads the descriptor, and PAGEMAP_SCAN tells what was accessed."""
    with Userfaultfd(Feature.RWP_ASYNC) as uffd:
        assert uffd.features == Feature.RWP | Feature.RWP_ASYNC
        uffd.register(region.address, PAGES * PAGE, RegisterMode.RWP)
        uffd.rwprotect(region.address, PAGES * PAGE, protect=True)
        assert accessed(region) == []
        assert region[2 * PAGE] == 2
        region[6 * PAGE] = 1
        assert accessed(region) == [2, 6]
        uffd.rwprotect(region.address, PAGES * PAGE, protect=True)
        assert accessed(region) == []
        assert uffd.read() == []


def test_the_mode_can_be_switched(region: Region) -> None:
    """UFFDIO_SET_MODE: from messages to none and back; other features cannot be switched."""
    with Userfaultfd(Feature.RWP) as uffd:
        uffd.register(region.address, PAGES * PAGE, RegisterMode.RWP)
        uffd.rwprotect(region.address, PAGES * PAGE, protect=True)
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        assert Feature.RWP_ASYNC in uffd.features
        assert region[PAGE] == 1
        uffd.set_mode(disable=Feature.RWP_ASYNC)
        assert Feature.RWP_ASYNC not in uffd.features
        with pytest.raises(aiouffd.OperationError, match="EINVAL"):
            uffd.set_mode(enable=Feature.SIGBUS)
        uffd.rwprotect(region.address, PAGES * PAGE, protect=False)


def test_what_is_refused(region: Region) -> None:
    """A range that is not registered for it, and one that is not aligned."""
    with Userfaultfd(Feature.RWP) as uffd:
        with pytest.raises(aiouffd.RangeGoneError):
            uffd.rwprotect(region.address, PAGE, protect=True)
        uffd.register(region.address, PAGES * PAGE, RegisterMode.RWP)
        with pytest.raises(aiouffd.OperationError, match="EINVAL"):
            uffd.rwprotect(region.address + 1, PAGE, protect=True)


def test_each_kind_of_memory_and_mode() -> None:
    """MISSING and RWP together, on private memory: a missing page is filled, then protected."""
    region = Region(PAGES * PAGE)
    with Userfaultfd(Feature.RWP) as uffd:
        uffd.register(region.address, PAGES * PAGE, RegisterMode.MISSING | RegisterMode.RWP)
        assert uffd.copy(region.address, b"x" * PAGE) == PAGE
        uffd.rwprotect(region.address, PAGE, protect=True)
        thread = threading.Thread(target=peek, args=(region.address,))
        thread.start()
        assert select.select([uffd], [], [], 10)[0]
        assert [event.kind for event in uffd.read() if isinstance(event, PageFault)] == [FaultKind.RWP]
        uffd.rwprotect(region.address, PAGE, protect=False)
        thread.join()
        assert region[0] == ord("x")
