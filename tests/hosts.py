"""Who serves a `machine.Machine`: each engine, the source that fails when it is told to, and kills."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import mmap
import os
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, TextIO

from pattern import PAGE, content
from processes import kill

import aiouffd
from aiouffd.server.server import Server

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

__all__ = ["Control", "EngineName", "Host", "Told"]

EngineName = Literal["pager", "served_by", "in_thread", "in_process"]


class Control:
    """Two counters that this process shares with the pager: reads that are to fail, and reads that have failed."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "r+b") as file:  # noqa: PTH123 - /proc/PID/fd is no path to resolve
            self._words = memoryview(mmap.mmap(file.fileno(), 16)).cast("Q")

    @classmethod
    def fresh(cls) -> Self:
        """Return one for this process and its pager."""
        fd = os.memfd_create("control")
        os.ftruncate(fd, 16)
        return cls(f"/proc/{os.getpid()}/fd/{fd}")

    def __reduce__(self) -> Any:
        return type(self), (self.path,)

    def fail(self, reads: int) -> None:
        """Let the next reads fail."""
        self._words[0] = reads

    @property
    def failing(self) -> bool:
        """Tell whether the next read fails."""
        return self._words[0] > 0

    @property
    def failures(self) -> int:
        """How many reads have failed."""
        return self._words[1]

    def count(self) -> None:
        """Note that a read fails."""
        self._words[0] -= 1
        self._words[1] += 1


class Told:
    """A source at hand, or a moment away, that may lie about one page, never give another, and fail now and then."""

    def __init__(self, pages: int, latency: float | None, lies: int, hangs: int, control: Control) -> None:
        self.size = pages * PAGE
        self.latency = latency
        self.lies = lies
        self.hangs = hangs
        self.control = control

    def bytes_of(self, offset: int, length: int) -> bytes:
        """Return what it says."""
        data = bytearray(content(offset, length))
        at = self.lies * PAGE + 100 - offset
        if self.lies >= 0 and 0 <= at < length:
            data[at] ^= 0xFF
        return bytes(data)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """Return the bytes, if they are at hand."""
        if self.latency is not None or self.control.failing or offset <= self.hangs * PAGE < offset + length:
            return None
        return self.bytes_of(offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, later or never, or fail."""
        if offset <= self.hangs * PAGE < offset + length:
            await asyncio.Event().wait()
        await asyncio.sleep(self.latency or 0)
        if self.control.failing:
            self.control.count()
            raise OSError(errno.EIO, "a bad moment")
        return self.bytes_of(offset, length)


class Elsewhere:
    """Keeps an asynchronous context manager entered, on a loop in a thread of its own."""

    def __init__(self, manager: AbstractAsyncContextManager[Any]) -> None:
        self._manager = manager
        self._entered: threading.Event = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leave = asyncio.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            async with self._manager:
                self._entered.set()
                await self._leave.wait()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that enters or leaves
            self._error = error
        finally:
            self._entered.set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._entered.wait()
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()
        if self._error is not None:
            raise self._error


class ServerProcess:
    """A server in a process of its own: a thread that waits for a page with the GIL held does not stop it.

    Forked, since nothing runs here yet: an interpreter takes 0.2 s to begin.
    """

    def __init__(self, source: Any, path: str, **options: Any) -> None:
        (asked, ask), (answer, answered) = os.pipe(), os.pipe()
        if os.fork() == 0:
            for end in (ask, answer):
                os.close(end)
            _serve(Server(source, path, **options), os.fdopen(asked), answered)
        for end in (asked, answered):
            os.close(end)
        self._ask, self._answers = ask, os.fdopen(answer)
        self.pids()  # it listens

    def pids(self) -> tuple[int, ...]:
        """Return the pager's processes."""
        os.write(self._ask, b"\n")
        return tuple(json.loads(self._answers.readline()))


def _serve(server: Server, asked: TextIO, answered: int) -> NoReturn:
    """Be that process, until the other one ends."""

    async def main() -> None:
        async with server:
            while await asyncio.to_thread(asked.readline):
                os.write(answered, f"{json.dumps(server.pids)}\n".encode())

    try:
        asyncio.run(main())
        os._exit(0)
    except BaseException:  # noqa: BLE001 - it is this process's end
        traceback.print_exc()
        os._exit(1)


class Host:
    """Serves a region by one of the engines.

    Attributes:
        local: the engine runs in this process: it knows of changes by the region's own methods only, and has no
            process to kill.
        kills: processes of the pager that were killed.
    """

    def __init__(self, engine: EngineName, region: aiouffd.Region, source: Any, **options: Any) -> None:
        self.engine = engine
        self.local = engine in {"in_thread", "in_process"}
        self.kills = 0
        self._progress: object = None
        self._gone: set[int] = set()  # processes that must have been replaced before another is killed
        self._server: ServerProcess | None = None
        self._stack = contextlib.ExitStack()
        if engine == "served_by":
            path = str(Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "socket")
            options["background"] = float("inf") if options["background"] else 0.0
            its_own = {name: options.pop(name) for name in ("readahead", "timeout", "background")}
            self._server = ServerProcess(source, path, **its_own)
            options["engine"] = aiouffd.ServedBy(path)
            self.monitor = aiouffd.Monitor(region, fork="serve", **options)
            return
        choices: dict[str, Any] = {
            "pager": aiouffd.Pager(),
            "in_thread": aiouffd.InThread(stuck_limit=None),
            "in_process": aiouffd.InProcess(stuck_limit=None),
        }
        fork: Any = "dontfork" if self.local else "serve"
        self.monitor = aiouffd.Monitor(region, source, engine=choices[engine], fork=fork, **options)

    def __enter__(self) -> Self:
        self._stack.enter_context(Elsewhere(self.monitor) if self.engine == "in_process" else self.monitor)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kill(self, which: int) -> None:
        """Kill keeper (0) or worker (1), when what was killed before has been replaced.

        Where both are dead, and a thread waits with the GIL held, nothing can start others: so where a keeper was
        killed, another worker must run than the one that it has left alone. Nobody is killed either if nothing was
        served since the last kill: five such deaths are given up.
        """
        while self._gone & set(pids := self._pids()):
            time.sleep(0.001)
        seen = self.monitor.statistics()
        progress = (seen.pages, seen.forks, seen.remaps, seen.removes, seen.unmaps)
        if progress != self._progress and pids[which] > 0 and kill(pids[which]):
            self._progress, self._gone = progress, {pids[which], pids[1]}
            self.kills += 1

    def _pids(self) -> tuple[int, ...]:
        return self.monitor.pids if self._server is None else self._server.pids()

    def cancel(self, start: int, length: int) -> None:
        """Ask for pages, and give up waiting at once."""

        async def main() -> None:
            prefetch = asyncio.ensure_future(self.monitor.prefetch(start, length))
            await asyncio.sleep(0)
            prefetch.cancel()
            await asyncio.wait([prefetch])

        asyncio.run(main())
