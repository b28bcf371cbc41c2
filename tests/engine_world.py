"""A fake process, the engine that serves it, and a model of what each page must hold."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from typing import TYPE_CHECKING, Any, cast

from pattern import PAGE, Pattern, content

from aiouffd.engine.assembly import make_backend, make_readahead
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.messages import serve_messages
from aiouffd.engine.options import Options, Service
from aiouffd.engine.space import Space
from aiouffd.engine.statistics import Counters
from aiouffd.errors import ClosedError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import RegisterMode
from aiouffd.kernel.memory import SealedMemory, address_of
from aiouffd.testing import FakeUffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiouffd.errors import UffdError
    from aiouffd.kernel.userfaultfd import Userfaultfd

BASE = 0x7F0000000000
ELSEWHERE = 0x7E0000000000
PAGES = 32
SIZE = PAGES * PAGE


class Located(Pattern):
    """At hand by address."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.memory = SealedMemory.from_buffer(content(0, size))
        self.address = address_of(self.memory.map)

    def locate(self, offset: int, length: int) -> int:
        """Return where the bytes lie."""
        return self.address + offset


LOCATED = Located(SIZE)
FIRST = {BASE + at: content(at, PAGE) for at in range(0, SIZE, PAGE)}
"""What each page shows before anything happens."""


class World:
    """A fake process, the engine that serves it, and a model of what each page must hold.

    Args:
        readahead: bytes.
        located: whether the source's bytes are in memory.
        source: another source, or a handler.
        options: further `Options`.
    """

    def __init__(
        self,
        readahead: int,
        *,
        located: bool = False,
        source: Any = None,
        uffd: FakeUffd | None = None,
        **options: Any,
    ) -> None:
        self.uffd = uffd or FakeUffd()
        self.uffd.register(BASE, SIZE, RegisterMode.MISSING)
        self.counters = Counters()
        self.errors: list[UffdError] = []
        chosen = Options(readahead=readahead, **options)
        source = source or (LOCATED if located else Pattern(SIZE))
        self.backend = make_backend(Service(source), self.counters, chosen)
        self.space = Space(
            cast("Userfaultfd", self.uffd),
            Mappings([Mapping(BASE, BASE + SIZE, 0)]),
            page_size=PAGE,
            backend=self.backend,
            counters=self.counters,
            on_error=lambda _, error: self.errors.append(error),
            readahead=make_readahead(PAGE, chosen, local=True),
        )
        self.model: dict[int, bytes] = dict(FIRST)

    def touch(self, page: int, thread: int) -> None:
        """Touch a page, if it is mapped."""
        if BASE + page * PAGE in self.model:
            self.uffd.touch(BASE + page * PAGE, thread)

    def remove(self, page: int, count: int) -> None:
        """Empty some pages."""
        start, end = BASE + page * PAGE, BASE + min(page + count, PAGES) * PAGE
        self.uffd.madvise_dontneed(start, end)
        self.model.update({at: bytes(PAGE) for at in range(start, end, PAGE) if at in self.model})

    def unmap(self, page: int, count: int) -> None:
        """Unmap some pages; who slept there is let go by the engine, and would get SIGSEGV."""
        self.removed()
        start, end = BASE + page * PAGE, BASE + min(page + count, PAGES) * PAGE
        self.uffd.munmap(start, end)
        for at in range(start, end, PAGE):
            self.model.pop(at, None)

    def move(self, page: int, count: int) -> None:
        """Move some mapped pages to where nothing is."""
        count = min(count, PAGES - page)
        source = BASE + page * PAGE
        places = range(source, source + count * PAGE, PAGE)
        target = ELSEWHERE + page * PAGE
        if not all(at in self.model for at in places) or target in self.model:
            return
        self.removed()
        self.uffd.mremap(source, target, count * PAGE)
        for at in places:
            self.model[at - source + target] = self.model.pop(at)

    def removed(self) -> None:
        """Have what is being emptied be empty: its pages go when its event has been read, from where they are then."""
        while any(message[0] == abi.EVENT_REMOVE for message, _ in self.uffd._events):
            self.deliver(64)

    def deliver(self, limit: int) -> bool:
        """Read and serve; tell whether there was anything."""
        data = self.uffd.read_raw(limit)
        if data:
            self.serve(data)
        return bool(data)

    def serve(self, data: bytes) -> None:
        """Serve messages that have been read."""
        serve_messages(self.space, memoryview(bytearray(data)), len(data), lambda *_: None)

    def serve_all(self) -> None:
        """Serve until nothing is left to do."""
        for _ in range(10_000):
            if not self.deliver(64) and not self.space.deferred:
                return
            self.space.retry()
        raise AssertionError("the engine never came to rest")

    @contextlib.asynccontextmanager
    async def dispatched(self) -> AsyncIterator[None]:
        """Read, serve and retry while the block runs, as a dispatcher does."""
        task = asyncio.create_task(self.dispatch())
        try:
            yield
        finally:
            task.cancel()

    async def dispatch(self) -> None:
        """Read, serve and retry, for ever."""
        while True:
            await asyncio.sleep(0.001)
            self.deliver(64)
            self.space.retry()
            while self.space.advance():
                pass


class Partly(Located):
    """At hand, apart from some pages that are waited for until they are let through, and one that fails once."""

    def __init__(self, far: set[int], fails: int = -1) -> None:
        super().__init__(SIZE)
        self.far = far
        self.fails = fails
        self.through = asyncio.Event()

    def locate(self, offset: int, length: int) -> Any:
        """Return where the bytes lie, if all of them are at hand."""
        pages = set(range(offset // PAGE, (offset + length) // PAGE))
        if self.fails in pages:
            self.fails = -1
            raise OSError(errno.EIO, "once")
        return None if pages & self.far else super().locate(offset, length)

    def read_nowait(self, offset: int, length: int) -> Any:
        """Have nothing."""

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, when that is allowed."""
        await self.through.wait()
        return content(offset, length)


class Held:
    """A source whose reads are answered, each alone, by the test.

    Attributes:
        reads: (offset, length, future of the answer) of each read, in order.
    """

    retries = 0

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.reads: list[tuple[int, int, asyncio.Future[bytes]]] = []

    async def read(self, offset: int, length: int) -> bytes:
        """Wait for the test's answer."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.reads.append((offset, length, answer))
        return await answer

    def answer(self, index: int = -1, error: Exception | None = None) -> None:
        """Answer a read, with its bytes or with an error."""
        offset, length, future = self.reads[index]
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(content(offset, length))


async def turns(count: int = 10) -> None:
    """Let every task that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


class PipedUffd(FakeUffd):
    """A fake whose messages are read from a pipe, so that a real dispatcher can read them."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Return the end that is read; ClosedError after `close`, as a real one."""
        if self.reader < 0:
            raise ClosedError("this fake is closed")
        return self.reader

    def send(self, limit: int = 64) -> None:
        """Write what threads have said so far, as one read would return it."""
        os.write(self.writer, self.read_raw(limit))

    def close(self) -> None:
        """Close both ends."""
        super().close()
        for fd in (self.reader, self.writer):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.reader = self.writer = -1
