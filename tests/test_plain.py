"""The fast path against a model: what is open is served from the right place, and nothing else is served at all."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from aiouffd.engine import plain
from aiouffd.engine.plain import SLOT, FastPath
from aiouffd.engine.statistics import Counter, Counters
from aiouffd.kernel import abi

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.plain import PlainSource

PAGE = 4096
START = 0x7000_0000_0000
DESCRIPTORS = st.integers(0, 5)


class Kernel:
    """What UFFDIO_COPY was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int, int, int]] = []
        self.refusal = 0

    def ioctl(self, fd: int, request: int, argument: bytearray) -> int:
        """Take a note, and answer."""
        assert request == abi.UFFDIO_COPY
        dst, src, length, mode, done = abi.COPY_STRUCT.unpack(argument)
        assert done == 0
        self.asked.append((fd, dst, src, length, mode))
        if self.refusal:
            raise OSError(self.refusal, "refused")
        abi.COPY_STRUCT.pack_into(argument, 0, dst, src, length, mode, length)
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Stand in for the kernel."""
    made = Kernel()
    monkeypatch.setattr(plain, "_ioctl", made.ioctl)
    return made


def fault(page: int, flags: int = 0, event: int = abi.EVENT_PAGEFAULT) -> memoryview:
    """Return a message."""
    return memoryview(bytearray(abi.PAGEFAULT_MESSAGE.pack(event, flags, START + page * PAGE + 17, 1)))


def serve(path: FastPath, fd: int, message: memoryview) -> bool:
    """Serve as the dispatcher does."""
    return path.serve(fd, SLOT.unpack_from(path.slots, fd * SLOT.size), message)


def at(base: int) -> Callable[[int, int], int | None]:
    """Return where a source lies that begins at `base`."""
    return lambda offset, _length: base + offset


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["admit", "dismiss", "open", "close", "fault"]),
            DESCRIPTORS,
            st.integers(0, 12),
            DESCRIPTORS,
        ),
        max_size=60,
    )
)
def test_only_what_is_open_is_served(steps: list[tuple[str, int, int, int]]) -> None:
    """Each step on a descriptor; a fault is served if its page is in what is open, out of that one's source."""
    kernel = Kernel()
    sources: list[PlainSource] = [
        (at(1 << (40 + number)), 10 * PAGE, PAGE, number & 2, False, None) for number in range(6)
    ]
    opened: dict[int, tuple[int, int] | None] = {}  # descriptor -> first page, number
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_ioctl", kernel.ioctl)
        path = FastPath(Counters(), {})
        for kind, fd, page, number in steps:
            if kind == "admit":
                path.admit(fd, fd + 100) if fd not in opened else None
                opened.setdefault(fd, None)
            elif fd not in opened:
                continue
            elif kind == "dismiss":
                path.dismiss(fd)
                del opened[fd]
                assert SLOT.unpack_from(path.slots, fd * SLOT.size)[0] < 0
            elif kind == "open":  # eight pages, of which the last may be behind the end of the source
                path.open(fd, START + page * PAGE, START + (page + 8) * PAGE, 4 * PAGE, sources[number])
                opened[fd] = (page, number)
            elif kind == "close":
                path.close(fd)
                opened[fd] = None
            else:
                open_for = opened[fd]
                expected = open_for is not None and 0 <= page - open_for[0] < 6
                assert serve(path, fd, fault(page)) == expected
                if open_for is not None and expected:
                    source = (1 << (40 + open_for[1])) + (4 + page - open_for[0]) * PAGE
                    assert kernel.asked.pop() == (fd, START + page * PAGE, source, PAGE, open_for[1] & 2)
                assert not kernel.asked
        used = {sources[number] for _, number in filter(None, opened.values())}
        assert {source for source in path._sources if source is not None} == used  # the others' sources are let go


def test_what_takes_more_than_a_copy_is_left(kernel: Kernel) -> None:
    """Other events and faults, what is not at hand, what the source or the kernel refuses: not done, not counted."""
    counters = Counters()
    path = FastPath(counters, {})
    path.admit(3, 1)

    def page(offset: int, _length: int) -> int | None:
        if offset == PAGE:
            raise OSError("broken")
        return None if offset == 2 * PAGE else 1 << 40

    path.open(3, START, START + 8 * PAGE, 0, (page, 1 << 20, PAGE, 0, False, None))
    assert not serve(path, 3, fault(0, event=abi.EVENT_REMOVE))
    assert not serve(path, 3, fault(0, flags=int(abi.FaultFlag.WP)))
    assert not serve(path, 3, fault(0, flags=int(abi.FaultFlag.MINOR)))
    assert not serve(path, 3, fault(1))
    assert not serve(path, 3, fault(2))
    assert not kernel.asked
    kernel.refusal = errno.EAGAIN
    assert not serve(path, 3, fault(0))
    assert sum(counters.words) == 0
    kernel.refusal = 0
    assert serve(path, 3, fault(0, flags=int(abi.FaultFlag.WRITE)))
    assert counters.words[Counter.FAULTS] == counters.words[Counter.PAGES_FAULT] == counters.words[Counter.COPIES] == 1
    assert counters.words[Counter.BYTES_FETCHED] == PAGE
