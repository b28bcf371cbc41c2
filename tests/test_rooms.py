"""`sources.rooms`: memory that is used again when nobody can read it any more."""

from __future__ import annotations

import gc
import mmap

import pytest

from aiouffd.kernel.memory import address_of
from aiouffd.sources import rooms
from aiouffd.sources.rooms import Rooms

MIB = 1 << 20


def test_memory_is_lent_again_when_its_last_view_has_ended() -> None:
    """Not before, whoever has a part of it."""
    lender = Rooms()
    first = lender.lend(2 * MIB)
    place = address_of(first)
    part = first[5:9]
    part[:] = b"mine"
    del first
    second = lender.lend(2 * MIB - 1)
    assert address_of(second) != place
    second[:] = b"x" * len(second)
    assert bytes(part) == b"mine"
    del part
    assert address_of(lender.lend(MIB)) == place


def test_finalizers_of_garbage_see_their_own_bytes() -> None:
    """They run after the memory has come back, and may keep what they find."""
    lender = Rooms()
    seen: list[bytes] = []
    kept: list[memoryview] = []

    class Reader:
        def __init__(self) -> None:
            self.buffer = lender.lend(2 * MIB)
            self.buffer[:4] = b"mine"
            self.itself = self

        def __del__(self) -> None:
            lender.lend(2 * MIB)[:5] = b"other"
            seen.append(bytes(self.buffer[:4]))
            kept.append(self.buffer)

    Reader()
    gc.collect()
    assert seen == [b"mine"]
    lender.lend(2 * MIB)[:5] = b"other"
    assert bytes(kept[0][:4]) == b"mine"


@pytest.mark.parametrize("length", [1, MIB - 1, MIB, 2 * MIB, 2 * MIB + 1, 8 * MIB])
def test_buffers_of_any_length(length: int) -> None:
    """Bytes that can be written; small and very large ones have memory of their own."""
    lender = Rooms()
    buffer = lender.lend(length)
    assert (buffer.nbytes, buffer.format, buffer.readonly, buffer.c_contiguous) == (length, "B", False, True)
    del buffer
    assert len(lender._free) == (MIB <= length <= 2 * MIB)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if more was lent at once; and `clear` frees it."""
    monkeypatch.setattr(rooms, "_MOST_KEPT", 3)
    lender = Rooms()
    lent = [lender.lend(2 * MIB) for _ in range(5)]
    assert len({address_of(buffer) for buffer in lent}) == 5
    lent.clear()
    assert len(lender._free) == 3
    lender.clear()
    assert not lender._free


def test_buffers_outlive_their_lender() -> None:
    """The memory ends with the last view."""
    buffer = Rooms().lend(2 * MIB)
    buffer[-1] = 7
    assert buffer[-1] == 7


def test_kernels_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages serve as well."""
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)
    assert len(Rooms().lend(2 * MIB)) == 2 * MIB
