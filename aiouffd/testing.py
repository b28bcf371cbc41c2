"""`FakeUffd`: the kernel's rules without a privilege, for tests of handlers and of other code that drives a descriptor.

It has an address space of pages in dictionaries, and threads that are numbers. It keeps the rules that handlers get
wrong:

- a page that was filled with DONTWAKE is present, and its sleepers still sleep;
- EEXIST wakes nobody; WAKE without a page makes the thread fault again;
- read delivers page faults before layout events;
- a thread that causes a layout event sleeps until that is read: REMOVE is sent before the pages go, REMAP and UNMAP
  after, and the UNMAP of a move when its REMAP has been read;
- while a layout event is unread, every resolving operation is EAGAIN; WAKE, REGISTER and UNREGISTER are not;
- a copy that meets a present page ends before it, and returns what it has done;
- a run that no single registered mapping covers is ENOENT; after `exit()` every operation is ESRCH (REGISTER and
  UNREGISTER: ENOMEM);
- memory that is not registered (any more) reads as zeros.

The same contract tests run against it and against the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
from collections import deque
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.errors import operation_error
from aiouffd.kernel import abi, userfaultfd
from aiouffd.kernel.abi import FaultFlag, Feature, Ioctl, RegisterMode
from aiouffd.kernel.memory import address_of
from aiouffd.kernel.owned_descriptor import OwnedDescriptor

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator

__all__ = ["POISONED", "FakeUffd"]

POISONED = b"poisoned"
"""In place of a page's bytes: a touch would be SIGBUS."""

_DONTWAKE = 1
_ADDRESS_SPACE = 1 << 47
"""The addresses of a process end one page below (TASK_SIZE): an operation behind that is EINVAL, not ENOENT."""


@attrs.define
class _Area:
    """Addresses [start, end) of one mapping.

    Attributes:
        origin: which mapping, and by how much it was moved. The kernel joins neighbours of one origin to one mapping,
            if both are registered or neither is.
        registered: whether faults on its missing pages are reported.
    """

    start: int
    end: int
    origin: tuple[int, int]
    registered: bool


class FakeUffd(OwnedDescriptor):
    """Stands for a `Userfaultfd` and for the process behind it.

    Args:
        features: that are enabled.
        page_size: in bytes.

    Attributes:
        page_size: in bytes.
        pages: page address -> its bytes, or `POISONED`. Other pages are missing.
        asleep: page address -> the threads that wait for it.
        failures: negated errnos, which the next resolving operations answer instead of doing anything; 0 lets one do
            its work.
    """

    def __init__(
        self, features: Feature = abi.LAYOUT_EVENTS | Feature.THREAD_ID, *, page_size: int = mmap.PAGESIZE
    ) -> None:
        self.page_size = page_size
        self.features = features
        self.ioctls: Ioctl = Ioctl.API | Ioctl.REGISTER | Ioctl.UNREGISTER
        self.opened_by = "fake"
        self.pages: dict[int, bytes] = {}
        self.asleep: dict[int, list[int]] = {}
        self.failures: deque[int] = deque()
        self._areas: list[_Area] = []
        self._origins = itertools.count()
        self._faults: deque[tuple[int, bytes]] = deque()  # page, message
        self._events: deque[tuple[bytes, Iterator[bytes]]] = deque()  # message, what its thread does when it is read
        self._alive = True
        super().__init__(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    @property
    def mappings(self) -> list[tuple[int, int]]:
        """The registered ranges: (start, end), in order."""
        return [(area.start, area.end) for area in self._areas if area.registered]

    # What threads do

    def touch(self, address: int, thread: int = 1) -> bytes | None:
        """Have a thread touch a page: return its bytes, or None if the thread sleeps now, until it is woken.

        Raises:
            MemoryError: nothing is mapped there.
        """
        page = address & -self.page_size
        if page in self.pages:
            return self.pages[page]
        area = next((area for area in self._areas if area.start <= page < area.end), None)
        if area is None:
            raise MemoryError(f"nothing is mapped at {address:#x}")
        if not area.registered:
            return self.pages.setdefault(page, bytes(self.page_size))
        told = thread if self.features & Feature.THREAD_ID else 0
        self.asleep.setdefault(page, []).append(thread)
        self._faults.append((page, abi.PAGEFAULT_MESSAGE.pack(abi.EVENT_PAGEFAULT, FaultFlag(0), page, told)))
        self._signal()
        return None

    def mmap(self, start: int, length: int) -> None:
        """Have a thread map memory where nothing is mapped. It is not registered yet."""
        if any(area.start < start + length and start < area.end for area in self._areas):
            raise FileExistsError(errno.EEXIST, f"something is mapped in [{start:#x}, {start + length:#x})")
        self._areas.append(_Area(start, start + length, (next(self._origins), 0), registered=False))
        self._areas.sort(key=lambda area: area.start)

    def madvise_dontneed(self, start: int, end: int) -> None:
        """Have a thread empty a range: REMOVE is queued, and the pages go when it has been read."""
        self._go_on(self._dontneed(start, end))

    def munmap(self, start: int, end: int) -> None:
        """Have a thread unmap a range. Threads that sleep there sleep on until they are woken."""
        self._go_on(self._munmap(start, end))

    def mremap(self, source: int, destination: int, length: int) -> None:
        """Have a thread move memory, over what is mapped at its destination: REMAP, then UNMAP of the old place.

        Raises:
            OSError: EFAULT: the source is not within one mapping.
        """
        area = next((item for item in self._areas if item.start <= source and source + length <= item.end), None)
        if area is None:
            raise OSError(errno.EFAULT, f"no single mapping covers [{source:#x}, {source + length:#x})")
        self._go_on(self._mremap(area, source, destination, length))

    def exit(self) -> None:
        """Have the process end."""
        self._alive = False
        self.asleep.clear()
        self._faults.clear()
        self._events.clear()
        self._signal()

    # What a handler does

    def register(self, start: int, len: int, mode: RegisterMode) -> Ioctl:  # noqa: A002
        """As UFFDIO_REGISTER. If nothing is mapped in the range, a mapping is made."""
        if mode != RegisterMode.MISSING or not self._valid(start, len):
            raise operation_error("UFFDIO_REGISTER", start, len, errno.EINVAL)
        if not self._alive:
            raise operation_error("UFFDIO_REGISTER", start, len, errno.ENOMEM)
        if not self._within(start, start + len):
            self.mmap(start, len)
        self._set_registered(start, start + len, registered=True)
        return Ioctl.WAKE | Ioctl.COPY | Ioctl.ZEROPAGE | Ioctl.POISON

    def unregister(self, start: int, len: int) -> None:  # noqa: A002
        """As UFFDIO_UNREGISTER: sleepers are woken, missing pages are zeros."""
        if not self._valid(start, len):
            raise operation_error("UFFDIO_UNREGISTER", start, len, errno.EINVAL)
        if not self._alive:
            raise operation_error("UFFDIO_UNREGISTER", start, len, errno.ENOMEM)
        found = self._within(start, start + len)
        if not found:
            raise operation_error("UFFDIO_UNREGISTER", start, len, errno.EINVAL)
        ranges = [(max(start, area.start), min(start + len, area.end)) for area in found if area.registered]
        self._set_registered(start, start + len, registered=False)
        for low, high in ranges:
            self._wake(low, high)

    def copy(self, dst: int, src: Any, *, wake: bool = True, write_protect: bool = False) -> int:
        """As `Userfaultfd.copy`."""
        length = memoryview(src).nbytes
        mode = (0 if wake else _DONTWAKE) | (abi.COPY_MODE_WP if write_protect else 0)
        return self._done("UFFDIO_COPY", dst, length, self.try_copy(dst, address_of(src), length, mode))

    def zeropage(self, start: int, len: int, *, wake: bool = True) -> int:  # noqa: A002
        """As `Userfaultfd.zeropage`."""
        return self._done("UFFDIO_ZEROPAGE", start, len, self.try_zeropage(start, len, 0 if wake else _DONTWAKE))

    def continue_(self, start: int, len: int, *, wake: bool = True, write_protect: bool = False) -> int:  # noqa: A002
        """As `Userfaultfd.continue_`."""
        mode = (0 if wake else _DONTWAKE) | (abi.CONTINUE_MODE_WP if write_protect else 0)
        return self._done("UFFDIO_CONTINUE", start, len, self.try_continue(start, len, mode))

    def poison(self, start: int, len: int, *, wake: bool = True) -> int:  # noqa: A002
        """As `Userfaultfd.poison`."""
        return self._done("UFFDIO_POISON", start, len, self.try_poison(start, len, 0 if wake else _DONTWAKE))

    def wake(self, start: int, len: int) -> None:  # noqa: A002
        """As `Userfaultfd.wake`."""
        self._done("UFFDIO_WAKE", start, len, self.try_wake(start, len))

    def writeprotect(self, start: int, len: int, *, protect: bool, wake: bool = True) -> None:  # noqa: A002
        """Not for this memory: it is registered for missing pages only."""
        mode = abi.WRITEPROTECT_MODE_WP if protect else 0 if wake else abi.WRITEPROTECT_MODE_DONTWAKE
        self._done("UFFDIO_WRITEPROTECT", start, len, self.try_writeprotect(start, len, mode))

    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int:
        """As `Userfaultfd.try_copy`: `src` is an address of this process."""
        return self._fill(
            dst,
            length,
            mode,
            lambda at: ctypes.string_at(src + at, self.page_size),
            heals=True,
            refused=abi.COPY_MODE_WP,
        )

    def try_copies(self, copies: array[int], mode: int) -> int:
        """As `Userfaultfd.try_copies`."""
        each = zip(copies[::3], copies[1::3], copies[2::3], strict=True)
        done = (self.try_copy(*copy, mode | _DONTWAKE) == copy[2] for copy in each)
        return sum(itertools.takewhile(bool, done))

    def try_copy_missing(self, dst: int, src: int, length: int, mode: int, page: int) -> userfaultfd.Copied:
        """As `Userfaultfd.try_copy_missing`."""
        return userfaultfd.copy_missing(self.try_copy, dst, src, length, mode, page)

    def try_zeropage(self, start: int, length: int, mode: int) -> int:
        """As `Userfaultfd.try_zeropage`."""
        return self._fill(start, length, mode, lambda _: bytes(self.page_size))

    def try_continue(self, start: int, length: int, mode: int) -> int:
        """Not for this memory: it is anonymous."""
        refused = _DONTWAKE | abi.CONTINUE_MODE_WP
        return self._refusal(start, length, mode, refused) or -errno.EINVAL

    def try_writeprotect(self, start: int, length: int, mode: int) -> int:
        """Not for this memory: it is registered for missing pages only."""
        known = abi.WRITEPROTECT_MODE_WP | abi.WRITEPROTECT_MODE_DONTWAKE
        if mode == known:  # protecting wakes nobody
            return -errno.EAGAIN if self._events else -errno.EINVAL
        return self._refusal(start, length, mode, known) or -errno.ENOENT

    def try_poison(self, start: int, length: int, mode: int) -> int:
        """As `Userfaultfd.try_poison`."""
        return self._fill(start, length, mode, lambda _: POISONED)

    def try_wake(self, start: int, length: int) -> int:
        """As `Userfaultfd.try_wake`: a thread whose page is still missing faults again."""
        if not self._valid(start, length):
            return -errno.EINVAL
        self._wake(start, start + length)
        return length

    def read_raw(self, limit: int = 64) -> bytes:
        """Return up to `limit` messages of 32 bytes, as read(2) does: page faults first."""
        messages: list[bytes] = []
        while self._faults and len(messages) < limit:
            messages.append(self._faults.popleft()[1])
        threads: list[Iterator[bytes]] = []
        while self._events and len(messages) < limit:
            message, thread = self._events.popleft()
            messages.append(message)
            threads.append(thread)
        for thread in threads:  # they run when the read is over: their next messages are for the next read
            self._go_on(thread)
        self._signal()
        return b"".join(messages)

    def read(self) -> list[userfaultfd.Event]:
        """As `Userfaultfd.read`."""
        data = self.read_raw()
        return [userfaultfd.decode(data[at : at + 32], self._no_forks) for at in range(0, len(data), 32)]

    def fileno(self) -> int:
        """Return a descriptor that polls readable while there are messages."""
        return self._fd

    def gone(self) -> bool:
        """Tell whether the process has ended."""
        return not self._alive

    def close(self) -> None:
        """Close it: sleepers are woken, and missing pages read as zeros from now on."""
        if self._fd >= 0:
            super().close()
            for area in self._areas:
                area.registered = False
            self.asleep.clear()

    # The kernel's side

    def _refusal(self, start: int, length: int, mode: int, known: int) -> int:
        """Return what the kernel answers before it looks at a page, in its order; 0: nothing."""
        if self._events:
            return -errno.EAGAIN
        if not self._valid(start, length) or mode & ~known:
            return -errno.EINVAL
        if not self._alive:
            return -errno.ESRCH
        if not any(area.registered and area.start <= start and start + length <= area.end for area in self._areas):
            return -errno.ENOENT
        return 0

    def _fill(
        self,
        start: int,
        length: int,
        mode: int,
        content: Callable[[int], bytes],
        *,
        heals: bool = False,
        refused: int = 0,
    ) -> int:
        """Fill missing pages. `refused`: modes that the operation has, but this memory has not."""
        if self.failures and (failure := self.failures.popleft()):
            return failure
        if refusal := self._refusal(start, length, mode, _DONTWAKE | refused):
            return refusal
        if mode & refused:
            return -errno.EINVAL
        done = 0
        while done < length:
            page = start + done
            if page in self.pages and not (heals and self.pages[page] is POISONED):
                break
            self.pages[page] = content(done)
            done += self.page_size
        if done and not mode & _DONTWAKE:
            self._wake(start, start + done)
        return done or -errno.EEXIST

    def _wake(self, start: int, end: int) -> None:
        """Wake threads, and drop their messages that nobody has read yet."""
        woken = [(page, self.asleep.pop(page)) for page in sorted(self.asleep) if start <= page < end]
        self._faults = deque(item for item in self._faults if not start <= item[0] < end)
        for page, threads in woken:
            for thread in threads:
                with contextlib.suppress(MemoryError):  # SIGSEGV: it does not wait any more
                    self.touch(page, thread)
        self._signal()

    def _dontneed(self, start: int, end: int) -> Iterator[bytes]:
        for area in self._within(start, end):
            low, high = max(start, area.start), min(end, area.end)
            if area.registered and self.features & Feature.EVENT_REMOVE:
                yield _message(abi.EVENT_REMOVE, low, high)
            self._drop(low, high)

    def _munmap(self, start: int, end: int) -> Iterator[bytes]:
        told = self._cut_out(start, end) and self.features & Feature.EVENT_UNMAP
        self._drop(start, end)
        if told:
            yield _message(abi.EVENT_UNMAP, start, end)

    def _mremap(self, area: _Area, source: int, destination: int, length: int) -> Iterator[bytes]:
        moved = {
            page: self.pages[page] for page in range(source, source + length, self.page_size) if page in self.pages
        }
        covered = self._cut_out(destination, destination + length)
        self._drop(destination, destination + length)
        self._cut_out(source, source + length)
        self._drop(source, source + length)
        number, shift = area.origin
        stays = area.registered and bool(
            self.features & Feature.EVENT_REMAP
        )  # else the kernel unregisters what it moves
        self._areas.append(
            _Area(destination, destination + length, (number, shift + destination - source), registered=stays)
        )
        self._areas.sort(key=lambda item: item.start)
        self._join()
        self.pages.update({page - source + destination: data for page, data in moved.items()})
        if covered and self.features & Feature.EVENT_UNMAP:
            yield _message(abi.EVENT_UNMAP, destination, destination + length)
        if stays:
            yield _message(abi.EVENT_REMAP, source, destination, length)
        if area.registered and self.features & Feature.EVENT_UNMAP:
            yield _message(abi.EVENT_UNMAP, source, source + length)

    def _go_on(self, thread: Iterator[bytes]) -> None:
        """Let a thread run until it sends a message: it sleeps then, until that is read."""
        message = next(thread, None)
        if message is not None:
            self._events.append((message, thread))
            self._signal()

    def _drop(self, start: int, end: int) -> None:
        for page in [page for page in self.pages if start <= page < end]:
            del self.pages[page]

    def _within(self, start: int, end: int) -> list[_Area]:
        return [area for area in self._areas if area.start < end and start < area.end]

    def _cut_out(self, start: int, end: int) -> bool:
        """Unmap a range; tell whether any of it was registered."""
        self._split(start, end)
        gone = self._within(start, end)
        self._areas = [area for area in self._areas if area not in gone]
        return any(area.registered for area in gone)

    def _set_registered(self, start: int, end: int, *, registered: bool) -> None:
        self._split(start, end)
        for area in self._within(start, end):
            area.registered = registered
        self._join()

    def _split(self, *places: int) -> None:
        """Let areas end at these places."""
        for place in places:
            for area in self._areas[:]:
                if area.start < place < area.end:
                    self._areas.append(attrs.evolve(area, start=place))
                    area.end = place
        self._areas.sort(key=lambda area: area.start)

    def _join(self) -> None:
        """Join neighbours that are one mapping."""
        joined: list[_Area] = []
        for area in self._areas:
            last = joined[-1] if joined else None
            if last is not None and (last.end, last.origin, last.registered) == (
                area.start,
                area.origin,
                area.registered,
            ):
                last.end = area.end
            else:
                joined.append(area)
        self._areas = joined

    def _signal(self) -> None:
        if self._fd < 0:
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        if self._faults or self._events:
            os.eventfd_write(self._fd, 1)

    def _valid(self, start: int, length: int) -> bool:
        page = self.page_size
        return not (start % page or length % page) and length > 0 and 0 <= start <= _ADDRESS_SPACE - page - length

    @staticmethod
    def _done(operation: str, start: int, length: int, result: int) -> int:
        if result < 0:
            raise operation_error(operation, start, length, -result)
        return result

    @staticmethod
    def _no_forks(fd: int) -> Any:
        raise AssertionError(fd)


def _message(code: int, *numbers: int) -> bytes:
    data = bytes([code]).ljust(8, b"\0") + b"".join(number.to_bytes(8, "little") for number in numbers)
    return data.ljust(abi.MESSAGE_SIZE, b"\0")
