"""A descriptor and the memory it serves, in two makes that are told apart by nothing: the kernel's and `FakeUffd`'s.

`KernelWorld` takes its faults in threads of the calling process, without the GIL: use it in a child process only
(`scenario.play`). Pages are named by number: those of the registered memory from 0 on, those of a place that
memory can be moved to from `ELSEWHERE` on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pattern import PAGE

import aiouffd
from aiouffd import Feature, RegisterMode, Userfaultfd
from aiouffd.kernel import abi, libc, userfaultfd
from aiouffd.testing import POISONED, FakeUffd

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ELSEWHERE", "FEATURES", "FakeWorld", "KernelWorld", "Sleeper", "World", "world_of"]

FEATURES = abi.LAYOUT_EVENTS | Feature.THREAD_ID
ELSEWHERE = 1000
_MAP_FIXED_NOREPLACE = 0x100000  # Linux 4.17
_ARENA = 1400
"""Pages."""
_GAP = 4 << 30
_native = ctypes.CDLL(None, use_errno=True)
_native.mmap.restype = ctypes.c_void_p
_native.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_native.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]

Found = bytes | str
"""The first bytes of a page, or why there are none: "poisoned" or "unmapped"."""


class World(Protocol):
    """What cases do, and see."""

    uffd: Any

    def at(self, page: int) -> int:
        """Return a page's address."""

    def touch(self, page: int, thread: int) -> None:
        """Have a thread read a page; returns when it has, or sleeps."""

    def asleep(self, thread: int) -> bool:
        """Tell whether it sleeps, and has not been woken since it fell asleep."""

    def got(self, thread: int) -> Found:
        """Wait until a thread that was let go has read, and return what."""

    def dontneed(self, page: int, count: int) -> None:
        """Have another thread empty pages; returns when it has, or sleeps until its event is read. So do the next."""

    def munmap(self, page: int, count: int) -> None:
        """Unmap pages."""

    def mremap(self, page: int, to: int, count: int) -> None:
        """Move pages over whatever is at their destination."""

    def waiting(self) -> int:
        """Return how many threads sleep until their layout events are read."""

    def read(self) -> list[tuple[Any, ...]]:
        """Read the messages: faults as ("fault", page, flags, thread), events as (name, page, ..., count)."""

    def pages(self) -> dict[int, Found]:
        """Return the pages that are there."""

    def rest(self) -> None:
        """Wait until every thread that was let go has read, or sleeps again."""

    def close(self) -> None:
        """End it all."""


class _Base:
    uffd: Any
    base: int

    def at(self, page: int) -> int:
        """Return a page's address."""
        return self.base + page * PAGE

    def page(self, address: int) -> int:
        """Return an address's page."""
        return (address - self.base) // PAGE

    def threads(self) -> dict[int, int]:
        """Return the numbers of threads by what messages call them."""
        return {}

    def decoded(self, messages: list[aiouffd.Event]) -> list[tuple[Any, ...]]:
        """Return messages as cases see them; of faults that came in one read the order is that of the pages."""
        faults: list[tuple[Any, ...]] = []
        layout: list[tuple[Any, ...]] = []
        for event in messages:
            if isinstance(event, aiouffd.PageFault):
                assert not layout, "a fault behind a layout event"
                thread = self.threads().get(event.thread_id, event.thread_id)
                faults.append(("fault", self.page(event.address), int(event.flags), thread))
            elif isinstance(event, aiouffd.Remap):
                layout.append(("remap", self.page(event.source), self.page(event.destination), event.length // PAGE))
            else:
                assert isinstance(event, aiouffd.Remove | aiouffd.Unmap)
                name = type(event).__name__.lower()
                layout.append((name, self.page(event.start), (event.end - event.start) // PAGE))
        return sorted(faults) + layout


class FakeWorld(_Base):
    """`FakeUffd`."""

    def __init__(self, pages: int, features: Feature = FEATURES) -> None:
        self.uffd = FakeUffd(features)
        self.base = 0x7F0000000000
        self.uffd.mmap(self.base, pages * PAGE)
        self.uffd.register(self.base, pages * PAGE, RegisterMode.MISSING)
        self._touching: dict[int, int] = {}

    def touch(self, page: int, thread: int) -> None:
        """As `World`."""
        self._touching[thread] = page
        with contextlib.suppress(MemoryError):
            self.uffd.touch(self.at(page), thread)

    def asleep(self, thread: int) -> bool:
        """As `World`."""
        return any(thread in sleepers for sleepers in self.uffd.asleep.values())

    def got(self, thread: int) -> Found:
        """As `World`."""
        assert not self.asleep(thread)
        try:
            data = self.uffd.touch(self.at(self._touching[thread]))
        except MemoryError:
            return "unmapped"
        assert data is not None, "it was let go with nothing"
        return "poisoned" if data is POISONED else data[:8]

    def dontneed(self, page: int, count: int) -> None:
        """As `World`."""
        self.uffd.madvise_dontneed(self.at(page), self.at(page + count))

    def munmap(self, page: int, count: int) -> None:
        """As `World`."""
        self.uffd.munmap(self.at(page), self.at(page + count))

    def mremap(self, page: int, to: int, count: int) -> None:
        """As `World`."""
        self.uffd.mremap(self.at(page), self.at(to), count * PAGE)

    def waiting(self) -> int:
        """As `World`."""
        return len(self.uffd._events)

    def read(self) -> list[tuple[Any, ...]]:
        """As `World`."""
        return self.decoded(self.uffd.read())

    def pages(self) -> dict[int, Found]:
        """As `World`."""
        found = self.uffd.pages.items()
        return {self.page(address): "poisoned" if data is POISONED else data[:8] for address, data in found}

    def rest(self) -> None:
        """Nothing: they go on at once."""

    def close(self) -> None:
        """As `World`."""
        self.uffd.close()


class Sleeper(threading.Thread):
    """A thread in a system call that may sleep in the kernel's userfaultfd code."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.slept = 0
        self.start()

    def run(self) -> None:
        """Do it."""
        self.call()

    def _tells(self, name: str) -> str:
        try:
            return Path(f"/proc/self/task/{self.native_id}/{name}").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            return ""

    def _switches(self) -> int:
        status = self._tells("status")
        return int(status.partition("voluntary_ctxt_switches:")[2].split()[0]) if status else -1

    @property
    def asleep(self) -> bool:
        """Whether it sleeps until a page is there, or its event is read: what wakes it makes this False at once."""
        state = self._tells("stat").rpartition(")")[2].split()[:1]
        return state in (["S"], ["D"]) and self._tells("wchan") in (
            "handle_userfault",
            "userfaultfd_event_wait_completion",
        )

    def settle(self) -> None:
        """Wait until it sleeps or has ended."""
        end = time.monotonic() + 60
        while self.is_alive() and not self.asleep:
            assert time.monotonic() < end, f"it is in {self._tells('wchan')!r}"
            time.sleep(0)
        self.slept = self._switches()

    @property
    def undisturbed(self) -> bool:
        """Whether it sleeps, and has since `settle`."""
        return self.asleep and self._switches() == self.slept


@functools.cache
def _arena() -> int:
    """Return the address of memory that nothing else of this process comes to lie in, even where it is unmapped.

    The kernel puts what is mapped anew (the frames of a Python thread, for example: 16 KiB) into the highest gap that
    is large enough: so there is a large one right above.
    """
    begin = _native.mmap(None, _ARENA * PAGE + _GAP, 0, 0x4022, -1, 0)  # NONE, PRIVATE|ANONYMOUS|NORESERVE
    assert begin not in (None, ctypes.c_void_p(-1).value)
    libc.munmap(begin + _ARENA * PAGE, _GAP)
    return int(begin)


class KernelWorld(_Base):
    """The kernel's, with threads of this process."""

    def __init__(self, pages: int, features: Feature = FEATURES) -> None:
        self.base = _arena() + PAGE
        self._reserve(-1, _ARENA)
        libc.mmap_fixed(self.base, pages * PAGE)
        # A mapping that has had a page joins again after it was split; one that never had may not.
        ctypes.memset(self.base, 1, 1)
        libc.madvise(self.base, PAGE, mmap.MADV_DONTNEED)
        self.uffd = Userfaultfd(features)
        self.uffd.register(self.base, pages * PAGE, RegisterMode.MISSING)
        self._touchers: dict[int, Sleeper] = {}
        self._found: dict[int, Found] = {}
        self._layout: list[Sleeper] = []
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def threads(self) -> dict[int, int]:
        """As `_Base`."""
        return {toucher.native_id or 0: number for number, toucher in self._touchers.items()}

    def touch(self, page: int, thread: int) -> None:
        """As `World`."""

        def call() -> None:
            # A system call says what is wrong in place of a signal; each has a pipe, or they would wait for its lock.
            read, write = os.pipe()
            done = _native.write(write, self.at(page), 8)
            number = ctypes.get_errno()
            why = self._told(page, self._entries(page, 1)[0]) or "unmapped"  # EFAULT is all that it says itself
            assert done == 8 or number == errno.EFAULT
            self._found[thread] = os.read(read, 8) if done == 8 else why
            os.close(read)
            os.close(write)

        self._touchers[thread] = Sleeper(call)
        self._touchers[thread].settle()

    def asleep(self, thread: int) -> bool:
        """As `World`."""
        return self._touchers[thread].undisturbed

    def got(self, thread: int) -> Found:
        """As `World`."""
        self._touchers[thread].join(60)
        return self._found[thread]

    def _change(self, call: Callable[[], None]) -> None:
        thread = Sleeper(call)
        thread.settle()
        if thread.is_alive():
            self._layout.append(thread)

    def dontneed(self, page: int, count: int) -> None:
        """As `World`."""
        self._change(lambda: libc.madvise(self.at(page), count * PAGE, mmap.MADV_DONTNEED))

    def munmap(self, page: int, count: int) -> None:
        """As `World`."""

        def call() -> None:
            libc.munmap(self.at(page), count * PAGE)
            self._reserve(page, count)

        self._change(call)

    def _reserve(self, page: int, count: int, flags: int = 0) -> None:
        """Map what nobody may touch, and what is not registered."""
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags
        libc.mmap_fixed(self.at(page), count * PAGE, 0, kind)

    def mremap(self, page: int, to: int, count: int) -> None:
        """As `World`."""
        flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED

        def call() -> None:
            assert libc.mremap(self.at(page), count * PAGE, count * PAGE, flags, self.at(to)) == self.at(to)
            with contextlib.suppress(FileExistsError):  # another has moved memory there
                self._reserve(page, count, _MAP_FIXED_NOREPLACE)

        self._change(call)

    def waiting(self) -> int:
        """As `World`."""
        return len(self._layout)

    def read(self) -> list[tuple[Any, ...]]:
        """As `World`; what threads that went on say next is for the next read.

        So it is read message by message: a thread whose event has been read goes on at once, and can bring the next one
        before a read of many is over.
        """
        messages: list[aiouffd.Event] = []
        with contextlib.suppress(BlockingIOError):
            while not messages or isinstance(messages[-1], aiouffd.PageFault):
                message = os.read(self.uffd.fileno(), abi.MESSAGE_SIZE)
                messages.append(userfaultfd.decode(message, Userfaultfd.from_fd))
        found = self.decoded(messages)
        for thread in self._layout:
            thread.settle()
        self._layout = [thread for thread in self._layout if thread.is_alive()]
        return found

    def rest(self) -> None:
        """As `World`."""
        for toucher in self._touchers.values():
            if not toucher.undisturbed:
                toucher.settle()

    def pages(self) -> dict[int, Found]:
        """As `World`."""
        return {
            page: found for page, entry in enumerate(self._entries(0, _ARENA - 1)) if (found := self._told(page, entry))
        }

    def _entries(self, page: int, count: int) -> memoryview:
        return memoryview(os.pread(self._pagemap, 8 * count, self.at(page) // PAGE * 8)).cast("Q")

    def _told(self, page: int, entry: int) -> Found:
        if entry >> 63:
            return ctypes.string_at(self.at(page), 8)
        return "poisoned" if entry >> 62 & 1 else ""  # neither there nor missing: the mark that poisons it

    def close(self) -> None:
        """Let everybody go."""
        while self._layout:
            self.read()
        self.uffd.close()
        for toucher in self._touchers.values():
            toucher.join(60)
            assert not toucher.is_alive()
        os.close(self._pagemap)


def world_of(kind: str, pages: int, features: Feature = FEATURES) -> FakeWorld | KernelWorld:
    """Return one of them."""
    return FakeWorld(pages, features) if kind == "fake" else KernelWorld(pages, features)
