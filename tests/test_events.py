"""`kernel.events`: 32 bytes in, an event out."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NoReturn, cast

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.kernel import abi, events, userfaultfd
from aiouffd.kernel.abi import FaultFlag
from aiouffd.kernel.events import FaultKind

if TYPE_CHECKING:
    from aiouffd.kernel.userfaultfd import Userfaultfd

_u64 = st.integers(0, 2**64 - 1)


def refuse(fd: int) -> NoReturn:
    """No descriptor is expected."""
    raise AssertionError(fd)


@given(_u64, _u64, st.integers(0, 2**32 - 1))
def test_page_faults(flags: int, address: int, thread: int) -> None:
    """flags, address and thread id as the kernel lays them out; unknown flags are kept."""
    message = struct.pack("=B7xQQI4x", 0x12, flags, address, thread)
    fault = userfaultfd.decode(message, refuse)
    assert isinstance(fault, events.PageFault)
    assert (int(fault.flags), fault.address, fault.thread_id) == (flags, address, thread)
    assert fault.write == bool(flags & 1)
    kinds = {2: FaultKind.WP, 8: FaultKind.RWP, 4: FaultKind.MINOR}
    assert fault.kind is next((kind for flag, kind in kinds.items() if flags & flag), FaultKind.MISSING)


@given(_u64, _u64, _u64)
def test_layout_events(first: int, second: int, third: int) -> None:
    """REMAP has three numbers, REMOVE and UNMAP two."""
    assert userfaultfd.decode(struct.pack("=B7xQQQ", 0x14, first, second, third), refuse) == events.Remap(
        first, second, third
    )
    assert userfaultfd.decode(struct.pack("=B7xQQ8x", 0x15, first, second), refuse) == events.Remove(first, second)
    assert userfaultfd.decode(struct.pack("=B7xQQ8x", 0x16, first, second), refuse) == events.Unmap(first, second)


def test_fork_adopts_the_descriptor() -> None:
    """The number in the message is wrapped by whoever knows the features."""
    wrapped = cast("Userfaultfd", object())
    event = userfaultfd.decode(struct.pack("=B7xI20x", 0x13, 77), lambda fd: wrapped if fd == 77 else refuse(fd))
    assert event == userfaultfd.Fork(wrapped)


@given(st.binary(min_size=32, max_size=32))
def test_anything_decodes(message: bytes) -> None:
    """Whatever the kernel sends, known or not, is an event; unknown ones keep the whole message."""
    event = userfaultfd.decode(message, lambda fd: cast("Userfaultfd", fd))
    if message[0] not in range(0x12, 0x17):
        assert event == events.UnknownEvent(message[0], message)


def test_unknown_bits_are_kept() -> None:
    """A kernel newer than this package loses nothing in our types."""
    for kind in (abi.Feature, abi.Ioctl, abi.RegisterMode, FaultFlag):
        assert int(kind(1 << 50)) == 1 << 50
