"""`monitor.deciding`: a function of the application's chooses what becomes of a page that cannot be had."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Pattern, content, peek, word
from scenario import play, until

import aiouffd
from aiouffd.errors import HandlerError, SourceError, UffdError
from aiouffd.monitor.deciding import Deciding

if TYPE_CHECKING:
    from aiouffd.monitor.deciding import Choice

SIZE = 16 * PAGE
ENGINES = {"pager": aiouffd.Pager, "thread": aiouffd.InThread, "process": aiouffd.InProcess}
LOST = SourceError("a source", PAGE, 2 * PAGE, "is lost")


class Engine:
    """What is asked of an engine."""

    def __init__(self) -> None:
        self.given_up: list[tuple[int, int]] = []

    def give_up(self, offset: int, length: int) -> None:
        """Note it."""
        self.given_up.append((offset, length))


def test_what_is_chosen_is_done(caplog: pytest.LogCaptureFixture) -> None:
    """Each error is put as well; what cannot decide, or says anything else, has chosen the signal."""
    engine: Any = Engine()
    put: list[BaseException] = []
    choices: dict[str, Any] = {"is lost": "sigbus", "raised": "retry"}
    deciding = Deciding(lambda error: choices[getattr(error, "reason", "")], put.append, engine)
    handlers = HandlerError("a handler", "a fault", "raised")
    for error in (LOST, handlers):
        deciding(error)
    assert engine.given_up == [(PAGE, 2 * PAGE)]
    choices["raised"] = "sigbus"
    deciding(handlers)
    assert engine.given_up.pop() == (0, sys.maxsize)
    assert not caplog.messages
    choices["is lost"] = "never"
    deciding(LOST)
    choices.clear()
    deciding(LOST)
    assert engine.given_up == [(PAGE, 2 * PAGE)] * 3
    assert caplog.messages == ["on_error has not decided: the page is SIGBUS"] * 2
    assert put == [LOST, handlers, handlers, LOST, LOST]
    del engine
    deciding(LOST)  # it has ended
    assert put[-1] is LOST


class Outage(Pattern):
    """Fails as long as there is a file, which it removes after some failures."""

    retries = 0

    def __init__(self, path: str, failures: int = 1000) -> None:
        super().__init__(SIZE)
        self.path, self.failures = path, failures

    def read_nowait(self, offset: int, length: int) -> bytes | None:  # type: ignore[override]
        """Have nothing at hand."""
        return None

    async def read(self, offset: int, length: int) -> bytes:
        """Fail, or return the bytes."""
        if Path(self.path).exists():
            self.failures -= 1
            if not self.failures:
                Path(self.path).unlink()
            raise SourceError("Outage", offset, length, "not yet")
        return content(offset, length)


async def chosen(path: str, engine: str, choice: Choice) -> None:
    """Scenario: a page that cannot be had is waited for; then it can, or is given up."""
    faulthandler.enable(all_threads=False)  # the dump of a thread that runs meanwhile can end by SIGSEGV
    Path(path).touch()
    asked: list[UffdError] = []

    def choose(error: UffdError) -> Choice:
        asked.append(error)
        print(choice, flush=True)
        return choice

    region = aiouffd.Region(SIZE)
    options: Any = {"engine": ENGINES[engine](), "readahead": 0, "on_error": choose}
    got: list[bytes] = []
    async with aiouffd.Monitor(region, Outage(path), **options) as monitor:
        thread = threading.Thread(target=lambda: got.append(peek(region.address + 5 * PAGE)))
        thread.start()
        await until(lambda: asked and monitor.statistics().asked_again >= 2)
        assert str(asked[0]) == "Outage [20480, 24576): not yet"
        Path(path).unlink()
        await until(lambda: not thread.is_alive())
        assert (got, len(asked)) == ([word(5)], 1)
        with pytest.raises(SourceError, match="not yet"):
            monitor.check()


@pytest.mark.kernel
@pytest.mark.parametrize("engine", ENGINES)
def test_a_page_is_waited_for_or_given_up(engine: str, tmp_path: Path) -> None:
    """As the function says; SIGBUS comes with the next try."""
    path = str(tmp_path / "outage")
    assert play(chosen, path, engine, "retry")[0] == "retry\n"
    assert set(play(chosen, path, engine, "sigbus", status=-signal.SIGBUS)[0].split()) == {"sigbus"}


def holding_the_gil(path: str) -> None:
    """Scenario: the thread that waits holds the GIL, so that the function cannot run before the page has come."""
    Path(path).touch()
    region = aiouffd.Region(SIZE)

    def choose(_: UffdError) -> Choice:
        print("asked", flush=True)
        return "sigbus"

    with aiouffd.Monitor(region, Outage(path, 3), readahead=0, on_error=choose) as monitor:
        assert region[5 * PAGE] == 6
        assert monitor.statistics().asked_again == 3


@pytest.mark.kernel
def test_a_thread_that_holds_the_gil_waits_until_the_page_can_be_had(tmp_path: Path) -> None:
    """Nobody is asked meanwhile, and nothing is given up."""
    play(holding_the_gil, str(tmp_path / "outage"))
