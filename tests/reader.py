"""Somebody who reads descriptors and resolves what they tell: in a process of its own, or in a thread.

Served from another process, a test may touch memory with the GIL held, fork and move it, as it likes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections import Counter
from typing import TYPE_CHECKING, Self

from pattern import content

from aiouffd import FaultKind, Fork, PageFault, Remap, Remove, Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from kinds import Memory

    from aiouffd import Event


def in_child(function: Callable[[], None]) -> None:
    """Call a function in a forked child, and expect that it returns."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:  # noqa: BLE001 - the child must not go on with its parent's story
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the forked child ended with {status}"


class Resolver:
    """Fills what is missing with `pattern.content`, lifts protection, and counts what it was told, by its kind.

    Attributes:
        start: where the memory is now: it follows REMAP.
        page_size: in bytes.
        protect: what it fills is write-protected.
        seen: messages by name: missing, wp, minor, fork, remap, remove.
    """

    def __init__(self, memory: Memory, *, protect: bool = False) -> None:
        self.start = memory.address
        self.page_size = memory.page_size
        self.protect = protect
        self.seen: Counter[str] = Counter()
        self._removed: list[range] = []

    def handle(self, uffd: Userfaultfd, event: Event) -> None:
        """Do what one message asks for."""
        if isinstance(event, PageFault):
            page = event.address & -self.page_size
            if any(page in removed for removed in self._removed):
                return  # it touched between the REMOVE and the UNREGISTER, which has let it go already
            self.seen[event.kind.value] += 1
            if event.kind is FaultKind.MISSING:
                self.missing(uffd, page, event)
            elif event.kind is FaultKind.WP:
                uffd.writeprotect(page, self.page_size, protect=False)
            else:
                self.minor(uffd, page)
            return
        self.seen[type(event).__name__.lower()] += 1
        if isinstance(event, Remap):
            self.start += event.destination - event.source
        elif isinstance(event, Remove):
            self._removed.append(range(event.start, event.end))
            uffd.unregister(event.start, event.end - event.start)
        else:
            assert isinstance(event, Fork), event

    def missing(self, uffd: Userfaultfd, page: int, fault: PageFault) -> None:
        """Fill a page."""
        data = content(page - self.start, self.page_size)
        assert uffd.copy(page, data, write_protect=self.protect) == self.page_size

    def minor(self, uffd: Userfaultfd, page: int) -> None:
        """Map what the file has."""
        assert uffd.continue_(page, self.page_size, write_protect=self.protect) == self.page_size


class ReaderProcess:
    """A forked process in which a resolver reads a descriptor, and those of the children that it is told of.

    It is forked at once, so before the memory has pages that it would share. Should the resolver raise, it ends the
    process that started it: nobody else would let the toucher go.
    """

    def __init__(self, resolver: Resolver) -> None:
        self._control, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid:
            theirs.close()
            return
        self._control.close()
        try:
            self._run(resolver, theirs)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)

    @staticmethod
    def _run(resolver: Resolver, control: socket.socket) -> None:
        _, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not fds:
            return
        watched = [Userfaultfd.from_fd(fds[0])]
        while True:
            ready = select.select([*(uffd.fileno() for uffd in watched), control.fileno()], [], [])[0]
            for uffd in [uffd for uffd in watched if uffd.fileno() in ready]:
                for event in uffd.read():
                    resolver.handle(uffd, event)
                    if isinstance(event, Fork):
                        watched.append(event.uffd)
            if control.fileno() in ready:
                if not control.recv(1):  # the test has ended, well or not
                    return
                control.sendall(json.dumps(resolver.seen).encode() + b"\n")

    def serve(self, uffd: Userfaultfd) -> None:
        """Have it read this descriptor from now on."""
        socket.send_fds(self._control, [b"d"], [uffd.fileno()])

    def seen(self) -> dict[str, int]:
        """Return what it was told until now: all that the caller has waited for is in it."""
        self._control.sendall(b"?")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += self._control.recv(1 << 16)
        found: dict[str, int] = json.loads(answer)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        os.waitpid(self._pid, 0)


class ReaderThread:
    """A thread in which a resolver reads a descriptor: for what only the process itself may do (UFFDIO_MOVE).

    Whoever touches the memory must not hold the GIL.
    """

    def __init__(self, resolver: Resolver, uffd: Userfaultfd) -> None:
        self._resolver, self._uffd = resolver, uffd
        self._told, self._tell = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                ready = select.select([self._uffd.fileno(), self._told], [], [])[0]
                if self._uffd.fileno() in ready:
                    for event in self._uffd.read():
                        self._resolver.handle(self._uffd, event)
                if self._told in ready:
                    return
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._tell, b"x")
        self._thread.join()
        os.close(self._tell)
        os.close(self._told)
