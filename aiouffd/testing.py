"""`FakeUffd`: the kernel's rules without privilege, for tests of handlers and of whatever drives a descriptor.

An address space of pages in dictionaries, threads that are names. It keeps the rules that handlers get wrong:

- a page that was filled with DONTWAKE is there, and its sleepers still sleep;
- EEXIST wakes nobody; WAKE without a page makes the thread fault once more;
- read hands out page faults before layout events;
- while a layout event is unread, every resolving operation is EAGAIN; WAKE is not;
- a copy that meets a page that is there ends before it, and returns what it has done;
- a run that no single mapping covers is ENOENT; after `exit()` all is ESRCH.

The same contract tests run against it and against the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections import deque
from typing import TYPE_CHECKING, Any

from aiouffd.errors import operation_error
from aiouffd.kernel import abi, events
from aiouffd.kernel.abi import FaultFlag, Feature, Ioctl, RegisterMode
from aiouffd.kernel.memory import address_of

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["FakeUffd"]

PAGE = 4096
POISONED = b"poisoned"
"""In place of a page's bytes: whoever touches it would get SIGBUS."""

_DONTWAKE = 1


class FakeUffd:
    """Stands for a `Userfaultfd` and for the process behind it.

    Attributes:
        pages: page address -> its bytes, or `POISONED`. What is not in it is missing.
        asleep: page address -> the threads that wait for it.
        failures: negated errnos that the next resolving operations answer, in order, in place of doing anything; 0
            lets one do what it would.
    """

    def __init__(self, features: Feature = abi.LAYOUT_EVENTS) -> None:
        self.features = features
        self.ioctls = Ioctl.API | Ioctl.REGISTER | Ioctl.UNREGISTER
        self.opened_by = "fake"
        self.pages: dict[int, bytes] = {}
        self.asleep: dict[int, list[int]] = {}
        self.failures: deque[int] = deque()
        self.mappings: list[tuple[int, int]] = []
        self._faults: deque[bytes] = deque()
        self._events: deque[bytes] = deque()
        self._alive = True
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # What threads do

    def touch(self, address: int, thread: int = 1) -> bytes | None:
        """Have a thread touch a page: return its bytes, or None where it has to wait, asleep until it is woken."""
        page = address & -PAGE
        if page in self.pages:
            return self.pages[page]
        if not any(start <= page < end for start, end in self.mappings):
            raise MemoryError(f"nothing is mapped at {address:#x}")
        self.asleep.setdefault(page, []).append(thread)
        self._faults.append(abi.PAGEFAULT_MESSAGE.pack(abi.EVENT_PAGEFAULT, FaultFlag(0), page, thread))
        self._signal()
        return None

    def madvise_dontneed(self, start: int, end: int) -> None:
        """Have a thread empty a range: REMOVE is queued, and the pages go."""
        self._drop(start, end)
        self._layout(Feature.EVENT_REMOVE, abi.EVENT_REMOVE, start, end)

    def munmap(self, start: int, end: int) -> None:
        """Have a thread unmap a range; who sleeps there sleeps on until it is woken."""
        self._drop(start, end)
        self.mappings = [
            piece
            for low, high in self.mappings
            for piece in ((low, min(high, start)), (max(low, end), high))
            if piece[0] < piece[1]
        ]
        self._layout(Feature.EVENT_UNMAP, abi.EVENT_UNMAP, start, end)

    def mremap(self, source: int, destination: int, length: int) -> None:
        """Have a thread move a range that is mapped to where nothing is: REMAP, then UNMAP of what it left."""
        moved = {page: self.pages[page] for page in range(source, source + length, PAGE) if page in self.pages}
        self._layout(Feature.EVENT_REMAP, abi.EVENT_REMAP, source, destination, length)
        self.munmap(source, source + length)
        if self.features & Feature.EVENT_REMAP:  # else the kernel unregisters what it moves
            self.mappings.append((destination, destination + length))
        self.pages.update({page - source + destination: data for page, data in moved.items()})

    def exit(self) -> None:
        """Have the process end."""
        self._alive = False
        self.asleep.clear()

    # What a handler does

    def register(self, start: int, len: int, mode: RegisterMode) -> Ioctl:  # noqa: A002
        """As UFFDIO_REGISTER, for a mapping of its own."""
        if start % PAGE or len % PAGE or len <= 0 or not mode:
            raise operation_error("UFFDIO_REGISTER", start, len, errno.EINVAL)
        self.mappings.append((start, start + len))
        return Ioctl.WAKE | Ioctl.COPY | Ioctl.ZEROPAGE | Ioctl.POISON

    def unregister(self, start: int, len: int) -> None:  # noqa: A002
        """As UFFDIO_UNREGISTER: sleepers are let go, missing pages are zeros."""
        self.mappings = [item for item in self.mappings if not start <= item[0] < start + len]
        for page in [page for page in self.asleep if start <= page < start + len]:
            del self.asleep[page]
            self.pages.setdefault(page, bytes(PAGE))

    def copy(self, dst: int, src: Any, *, wake: bool = True, write_protect: bool = False) -> int:
        """As `Userfaultfd.copy`."""
        length = memoryview(src).nbytes
        mode = (0 if wake else _DONTWAKE) | (abi.COPY_MODE_WP if write_protect else 0)
        return self._done("UFFDIO_COPY", dst, length, self.try_copy(dst, address_of(src), length, mode))

    def zeropage(self, start: int, len: int, *, wake: bool = True) -> int:  # noqa: A002
        """As `Userfaultfd.zeropage`."""
        return self._done("UFFDIO_ZEROPAGE", start, len, self.try_zeropage(start, len, 0 if wake else _DONTWAKE))

    def poison(self, start: int, len: int, *, wake: bool = True) -> int:  # noqa: A002
        """As `Userfaultfd.poison`."""
        return self._done("UFFDIO_POISON", start, len, self.try_poison(start, len, 0 if wake else _DONTWAKE))

    def wake(self, start: int, len: int) -> None:  # noqa: A002
        """As `Userfaultfd.wake`."""
        self._done("UFFDIO_WAKE", start, len, self.try_wake(start, len))

    def writeprotect(self, start: int, len: int, *, protect: bool, wake: bool = True) -> None:  # noqa: A002
        """Not for this memory: it is registered for missing pages only."""
        raise operation_error("UFFDIO_WRITEPROTECT", start, len, errno.ENOENT)

    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int:
        """As `Userfaultfd.try_copy`: `src` is an address of this process."""
        return self._fill(dst, length, mode, lambda at: ctypes.string_at(src + at, PAGE), heals=True)

    def try_zeropage(self, start: int, length: int, mode: int) -> int:
        """As `Userfaultfd.try_zeropage`."""
        return self._fill(start, length, mode, lambda _: bytes(PAGE))

    def try_continue(self, start: int, length: int, mode: int) -> int:
        """Not for this memory: it is anonymous."""
        return -errno.EINVAL

    def try_writeprotect(self, start: int, length: int, mode: int) -> int:
        """Not for this memory: it is registered for missing pages only."""
        return -errno.ENOENT

    def try_poison(self, start: int, length: int, mode: int) -> int:
        """As `Userfaultfd.try_poison`."""
        return self._fill(start, length, mode, lambda _: POISONED)

    def try_wake(self, start: int, length: int) -> int:
        """As `Userfaultfd.try_wake`: who still misses his page faults once more."""
        if start % PAGE or length % PAGE or length <= 0:
            return -errno.EINVAL
        for page in sorted(page for page in self.asleep if start <= page < start + length):
            for thread in self.asleep.pop(page):
                if page not in self.pages and any(low <= page < high for low, high in self.mappings):
                    self.touch(page, thread)
        return length

    def read_raw(self, limit: int = 64) -> bytes:
        """Return up to `limit` messages of 32 bytes, as read(2) does: page faults first."""
        messages: list[bytes] = []
        for queue in (self._faults, self._events):
            while queue and len(messages) < limit:
                message = queue.popleft()
                page = abi.PAGEFAULT_MESSAGE.unpack(message)[2] if queue is self._faults else None
                if page is None or page in self.asleep:  # who was woken meanwhile has taken his message back
                    messages.append(message)
        self._signal()
        return b"".join(messages)

    def read(self) -> list[events.Event]:
        """As `Userfaultfd.read`."""
        data = self.read_raw()
        return [events.decode(data[at : at + 32], self._no_forks) for at in range(0, len(data), 32)]

    def fileno(self) -> int:
        """Return a descriptor that polls readable while there are messages."""
        return self._fd

    def gone(self) -> bool:
        """Tell whether the process has ended."""
        return not self._alive

    def close(self) -> None:
        """Close it: who sleeps is let go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.asleep.clear()

    def __del__(self) -> None:
        self.close()

    # The kernel's side

    def _fill(self, start: int, length: int, mode: int, content: Any, *, heals: bool = False) -> int:
        if self.failures and (failure := self.failures.popleft()):
            return failure
        if not self._alive:
            return -errno.ESRCH
        if self._events:
            return -errno.EAGAIN
        if start % PAGE or length % PAGE or length <= 0:
            return -errno.EINVAL
        if not any(low <= start and start + length <= high for low, high in self.mappings):
            return -errno.ENOENT
        done = 0
        while done < length:
            page = start + done
            if page in self.pages and not (heals and self.pages[page] is POISONED):
                break
            self.pages[page] = content(done)
            done += PAGE
        if done and not mode & _DONTWAKE:
            self._wake(range(start, start + done, PAGE))
        return done or -errno.EEXIST

    def _wake(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.asleep.pop(page, None)

    def _drop(self, start: int, end: int) -> None:
        for page in range(start, end, PAGE):
            self.pages.pop(page, None)

    def _layout(self, feature: Feature, code: int, *numbers: int) -> None:
        if self.features & feature:
            message = bytes([code]).ljust(8, b"\0") + b"".join(number.to_bytes(8, "little") for number in numbers)
            self._events.append(message.ljust(abi.MESSAGE_SIZE, b"\0"))
            self._signal()

    def _signal(self) -> None:
        if self._fd < 0:
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        if self._faults or self._events:
            os.eventfd_write(self._fd, 1)

    @staticmethod
    def _done(operation: str, start: int, length: int, result: int) -> int:
        if result < 0:
            raise operation_error(operation, start, length, -result)
        return result

    @staticmethod
    def _no_forks(fd: int) -> Any:
        raise AssertionError(fd)
