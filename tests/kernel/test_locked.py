"""`kernel.locked`: what mlockall does to new mappings."""

from __future__ import annotations

import ctypes
import mmap
import os
from unittest import mock

import pytest
from locking import MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT, lock_all, needs_root, unlock_all
from pattern import PAGE
from scenario import play

import aiouffd
from aiouffd.kernel import files
from aiouffd.kernel.locked import empty_locked, is_locked, is_populated, new_mappings_are_populated, smaps

HUGE = 2 << 20


def detection(flags: int) -> None:
    """Scenario."""
    assert not new_mappings_are_populated()
    assert not new_mappings_are_populated(HUGE)
    lock_all(flags)
    assert new_mappings_are_populated() == (flags == MCL_FUTURE)
    assert new_mappings_are_populated(HUGE) == bool(flags & MCL_FUTURE)


def told() -> None:
    """Scenario: there is a /proc, or none."""
    region = aiouffd.Region(4 * PAGE)
    assert not is_locked(region.address)
    lock_all(MCL_FUTURE)
    later = aiouffd.Region(4 * PAGE)
    assert not is_locked(region.address)
    assert is_locked(later.address)
    assert is_locked(later.address + 3 * PAGE)
    unlock_all()
    assert not is_locked(later.address)
    lock_all(MCL_CURRENT | MCL_ONFAULT)
    assert is_locked(region.address)
    with mock.patch.object(files, "read", side_effect=FileNotFoundError):
        assert not is_locked(region.address)


@needs_root
def test_whether_memory_is_locked() -> None:
    """A mapping that was there before stays as it is; where it cannot be told, it is not."""
    play(told)


@needs_root
@pytest.mark.parametrize("flags", [MCL_CURRENT, MCL_FUTURE, MCL_FUTURE | MCL_ONFAULT])
def test_mlockall_is_noticed(flags: int) -> None:
    """MCL_FUTURE fills small pages unless MCL_ONFAULT is given with it, and huge ones always."""
    play(detection, flags)


def emptied(shared: bool) -> None:
    """Scenario."""
    lock_all(MCL_FUTURE)
    fd = os.memfd_create("emptied") if shared else -1
    if shared:
        os.ftruncate(fd, 8 * PAGE)
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(fd, 8 * PAGE, flags=flags) as area:
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert is_populated(address + 3 * PAGE)
        empty_locked(address, 8 * PAGE, fd)
        assert not any(is_populated(address + page * PAGE) for page in range(8))
        assert not shared or os.fstat(fd).st_blocks == 0


@needs_root
@pytest.mark.parametrize("shared", [False, True])
def test_a_locked_mapping_is_emptied(shared: bool) -> None:
    """MADV_DONTNEED is refused for locked memory: it is unlocked first."""
    play(emptied, shared)


def test_smaps_tells_each_mapping() -> None:
    """Its range, its flags, and what else is said of it; without /proc, nothing."""
    region = aiouffd.Region(5 * PAGE)
    region[0] = 1
    ((mapping, flags, text),) = [item for item in smaps() if region.address in item[0]]
    assert mapping.start <= region.address
    assert mapping.end >= region.address + 5 * PAGE
    assert {"rd", "wr", "nr"} <= set(flags)
    assert text.count("\nRss:") == 1
