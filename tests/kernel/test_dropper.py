"""`native.dropper`: a thread drops private pages of its process for another one, and nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pattern import PAGE, content
from scenario import eventually, play

from aiouffd.kernel import abi, libc
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import address_of, map_file, mapped
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.lifetime import close_in_children
from aiouffd.monitor.engines.on_demand import may_be_dropped
from aiouffd.native import dropper
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not may_be_dropped(), reason="Linux 6.18 moves pages in batches")

PAGES = 1200  # more than are moved at once
SIZE = PAGES * PAGE


class Asker:
    """Memory of this process, all of it there and protected, and who drops it; this thread asks."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = address_of(self.memory)
        self.uffd = stack.enter_context(Userfaultfd(abi.LAYOUT_EVENTS | Feature.PAGEFAULT_FLAG_WP))
        close_in_children(self.uffd)
        self.uffd.register(self.address, SIZE, RegisterMode.MISSING | RegisterMode.WP)
        data = content(0, SIZE)
        assert self.uffd.try_copy(self.address, address_of(data), SIZE, abi.COPY_MODE_WP) == SIZE
        words = os.memfd_create("words")
        os.ftruncate(words, mmap.PAGESIZE)
        self.words = map_file(words, mmap.PAGESIZE, mmap.ACCESS_WRITE)
        self.dropper = stack.enter_context(contextlib.closing(dropper.Dropper(self.uffd.fileno(), words)))
        self.pagemap = stack.enter_context(Pagemap())

    def ask(self, *pages: tuple[int, int]) -> list[int] | None:
        """Ask for pages, and return what is answered."""
        place = address_of(self.words)
        ranges = [(self.address + start * PAGE, self.address + end * PAGE) for start, end in pages]
        dropper.ask(self.words, place, ranges)
        return dropper.answered(self.words, place, 10_000, len(ranges))

    @property
    def missing(self) -> list[Range]:
        """The pages that are missing."""
        found = self.pagemap.missing(self.address, SIZE)
        return [Range((each.start - self.address) // PAGE, each.length // PAGE) for each in found]


@contextlib.contextmanager
def asker() -> Iterator[Asker]:
    """Give what asks."""
    with contextlib.ExitStack() as stack:
        yield Asker(stack)


def asked() -> None:
    """Scenario: pages are dropped, also where some are missing already, and more than are moved at once."""
    with asker() as one:
        assert one.ask((2, 3), (5, 9)) == [0, 0]
        assert one.missing == [Range(2, 1), Range(5, 4)]
        assert one.ask((0, 1100)) == [0]
        assert one.missing == [Range(0, 1100)]
        assert one.memory[1100 * PAGE :] == content(1100 * PAGE, SIZE - 1100 * PAGE)
        data = content(0, PAGE)
        assert (
            one.uffd.try_copy(one.address, address_of(data), PAGE, abi.COPY_MODE_WP) == PAGE
        )  # missing, and no marker
        libc.mprotect(one.address + 1199 * PAGE, PAGE, mmap.PROT_READ)
        assert one.ask((1198, 1199), (1199, 1200)) == [0, errno.EINVAL]
        assert one.missing[-1].end == 1199
        one.dropper.close()
        assert one.ask((1100, 1101)) == [errno.ECANCELED]
        assert one.missing[-1] == Range(1198, 1)


def test_pages_are_dropped() -> None:
    """Until the end, and but for what may not be written to."""
    play(asked)


def replaced() -> None:
    """Scenario: another thread has unmapped pages, which nobody has read, and their place has other memory by now."""
    with asker() as one:
        start, size = one.address + 100 * PAGE, 10 * PAGE
        thread = threading.Thread(target=libc.munmap, args=(start, size))
        thread.start()
        eventually(lambda: mapped(start, size), [])
        libc.mmap_fixed(start, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        ctypes.memset(start, 7, size)
        assert one.ask((90, 120)) == [errno.EAGAIN]
        assert ctypes.string_at(start, size) == b"\7" * size
        assert one.missing == []
        assert len(one.uffd.read()) == 1
        thread.join()
        assert one.ask((90, 100)) == [0]
        assert one.missing == [Range(90, 10)]


def test_what_was_unmapped_is_not_dropped() -> None:
    """While the one that asks has not read it, the kernel moves nothing."""
    play(replaced)


def forked() -> None:
    """Scenario: a child has neither the descriptor nor the thread, and closes nothing of its own with them."""
    with asker() as one:

        def descriptors() -> int:
            return sum(os.path.realpath(each).endswith("[userfaultfd]") for each in Path("/proc/self/fd").iterdir())

        assert descriptors() == 2
        libc.madvise(one.address, SIZE, libc.MADV_DONTFORK)
        child = os.fork()
        if not child:
            left = descriptors()
            with asker() as own:
                one.dropper.close()  # is its parent's
                os._exit(left if own.ask((0, 4)) == [0] else 99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert one.ask((0, 4)) == [0]


def test_forked_children_drop_nothing() -> None:
    """The parent's thread goes on."""
    play(forked)


def many() -> None:
    """Scenario: more than there are numbers for anywhere else."""
    with asker() as one, contextlib.ExitStack() as stack:
        for _ in range(300):
            words = os.memfd_create("words")
            stack.callback(os.close, words)
            os.ftruncate(words, mmap.PAGESIZE)
            stack.enter_context(contextlib.closing(dropper.Dropper(one.uffd.fileno(), words)))
        assert one.ask((0, 4)) == [0]


def test_there_may_be_many() -> None:
    """Each Monitor with a limit has one."""
    play(many)
