"""`engine.retrying`: threads that wait for a page until it can be had (`on_error="retry"`)."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Pattern, content, peek, word
from processes import PATIENCE
from scenario import play, until

import aiouffd
from aiouffd.engine import retrying
from aiouffd.engine.retrying import Retrying
from aiouffd.errors import HandlerError, SourceError, UffdError

if TYPE_CHECKING:
    from aiouffd import Batch, Fault

SIZE = 16 * PAGE
ENGINES = {"pager": aiouffd.Pager, "thread": aiouffd.InThread, "process": aiouffd.InProcess}


class Space(SimpleNamespace):
    """What is asked of a space, and whom it has woken."""

    def __init__(self) -> None:
        self.woken: list[int] = []
        resolver = SimpleNamespace(wake=lambda page, _: self.woken.append(page))
        super().__init__(page_size=PAGE, resolver=resolver, closing=False, is_gone=False)


async def test_sleepers_are_woken_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is said is said once a minute for each page; nobody is woken in what is served no longer."""
    monkeypatch.setattr(retrying, "_PAUSE", 0.001)
    clock = 1000.0
    monkeypatch.setattr(retrying, "monotonic", lambda: clock)
    space: Any = Space()
    again = Retrying(space)
    assert again.postpone([PAGE, 2 * PAGE])
    assert not again.postpone([PAGE])
    assert again.postpone([PAGE, 3 * PAGE])
    assert space.woken == []
    await until(lambda: len(space.woken) == 5)
    clock += 59
    assert not again.postpone([PAGE])
    clock += 1
    assert again.postpone([PAGE])
    space.closing = True
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(0.002, passed.set)  # after those that were planned before
    await passed.wait()
    assert len(space.woken) == 5
    monkeypatch.setattr(retrying, "_MOST", 2)
    assert again.postpone([PAGE])


class Outage(Pattern):
    """Fails as long as there is a file."""

    retries = 0

    def __init__(self, path: str, *, defect: bool = False) -> None:
        super().__init__(SIZE)
        self.path, self.defect = path, defect

    def read_nowait(self, offset: int, length: int) -> bytes | None:  # type: ignore[override]
        """Have nothing at hand; or fail at once."""
        if self.defect and Path(self.path).exists():
            raise OSError("a defect")
        return super().read_nowait(offset, length) if self.defect else None

    async def read(self, offset: int, length: int) -> bytes:
        """Fail, or return the bytes."""
        if Path(self.path).exists():
            raise SourceError("Outage", offset, length, "not yet")
        return content(offset, length)


class OutOfOrder(aiouffd.Handler):
    """Raises as long as there is a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    async def pagefault(self, fault: Fault, batch: Batch) -> None:
        """Fail, or fill the page."""
        if Path(self.path).exists():
            raise OSError("not yet")
        batch.copy(fault.page, content(fault.offset, PAGE))


ORIGINS: dict[str, tuple[Any, type[UffdError], str]] = {
    "source": (Outage, SourceError, "not yet"),
    "defect": (lambda path: Outage(path, defect=True), UffdError, "a defect"),
    "handler": (OutOfOrder, HandlerError, "not yet"),
}


async def outage(path: str, engine: str, kind: str) -> None:
    """Scenario: two threads touch a page that cannot be had; then it can."""
    Path(path).touch()
    origin, error, reason = ORIGINS[kind]
    region = aiouffd.Region(SIZE)
    got: list[bytes] = []
    options: Any = {"engine": ENGINES[engine](), "readahead": 4 * PAGE, "on_error": "retry", "on_exit": "zeros"}

    def touch(page: int) -> None:
        got.append(peek(region.address + page * PAGE))

    async with aiouffd.Monitor(region, origin(path), **options) as monitor:
        threads = [threading.Thread(target=touch, args=(5,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        await until(lambda: monitor.statistics().asked_again >= 2)
        with pytest.raises(error, match=reason):
            await asyncio.wait_for(monitor.wait_error(), PATIENCE)
        with pytest.raises(error, match=reason):
            await monitor.prefetch(9 * PAGE, PAGE)
        assert got == []
        Path(path).unlink()
        await until(lambda: not any(thread.is_alive() for thread in threads))
        assert got == [word(5)] * 2
        assert monitor.statistics().pages_poisoned == 0
        monitor.check()  # the same error was told once
        Path(path).touch()
        got.clear()
        threads = [threading.Thread(target=touch, args=(15,))]
        threads[0].start()
        await until(lambda: monitor.statistics().asked_again >= 3)
    await until(lambda: not threads[0].is_alive())
    assert got == [bytes(8)]


CASES = [("pager", "source"), ("thread", "source"), ("process", "source"), ("pager", "defect"), ("pager", "handler")]


@pytest.mark.kernel
@pytest.mark.parametrize(("engine", "kind"), CASES)
def test_threads_wait_until_a_page_can_be_had(engine: str, kind: str, tmp_path: Path) -> None:
    """They get its bytes; `prefetch` raises meanwhile; to leave the Monitor lets them go."""
    play(outage, str(tmp_path / "outage"), engine, kind)


async def killed(path: str) -> None:
    """Scenario: the worker is killed while a thread waits in a pause."""
    Path(path).touch()
    region = aiouffd.Region(SIZE)
    got: list[bytes] = []
    async with aiouffd.Monitor(region, Outage(path), readahead=0, on_error="retry") as monitor:
        thread = threading.Thread(target=lambda: got.append(peek(region.address)))
        thread.start()
        await until(lambda: monitor.statistics().asked_again >= 1)
        os.kill(monitor.pids[1], signal.SIGKILL)
        await until(lambda: monitor.statistics().asked_again >= 3)
        Path(path).unlink()
        await until(lambda: not thread.is_alive())
    assert got == [word(0)]


@pytest.mark.kernel
def test_a_successor_goes_on_asking(tmp_path: Path) -> None:
    """What was asked for by a worker that is dead is asked for by the next."""
    play(killed, str(tmp_path / "outage"))


@pytest.mark.parametrize("wrong", ["never", None, "zeros"])
def test_what_may_become_of_an_error(wrong: Any) -> None:
    """Other words are refused; a server decides for itself."""
    with pytest.raises(ValueError, match="on_error is 'sigbus' or 'retry', not"):
        aiouffd.Monitor(aiouffd.Region(PAGE), on_error=wrong)
    served: Any = aiouffd.ServedBy("/nowhere")
    with pytest.raises(ValueError, match="takes no on_error"):
        aiouffd.Monitor(aiouffd.Region(PAGE), engine=served, on_error="retry")
