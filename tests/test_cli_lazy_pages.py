"""`cli.lazy_pages`: what the command makes of its options. What it does with CRIU is in tests/kernel."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from aiouffd import cli
from aiouffd.cli import daemon, lazy_pages
from aiouffd.criu.page_server import HEADER_4_1, HEADER_4_2

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Service:
    """Stands in for `LazyPages`: keeps what it was given, and is done when it is told."""

    given: dict[str, Any]
    signals = 0
    errors: tuple[BaseException, ...] = ()
    tasks = 0
    pages = 0
    pids = (1, 2)

    def __init__(self, images: str, **options: Any) -> None:
        Service.given = {"images": images, **options}

    @property
    def holds_pages(self) -> bool:
        """Whether there is a page server."""
        return self.given["page_server"] is not None

    async def run(self, ready: Callable[[], None]) -> None:
        """Send the signals that the test wants; end by itself if there are none."""
        ready()
        for _ in range(self.signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
        if self.signals:
            await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command make a `Service`."""
    monkeypatch.setattr(lazy_pages, "LazyPages", Service)
    monkeypatch.setattr(daemon, "log_to", lambda _: None)  # else pytest's own handlers are removed


def given(name: str) -> Any:
    """Return an argument of the newest service."""
    return Service.given[name]


def test_what_the_options_mean(tmp_path: Path) -> None:
    """The directory, the page server with the header of its version, readahead and background."""
    assert cli.main(["lazy-pages", "-D", str(tmp_path)]) == 0
    assert given("images") == str(tmp_path)
    assert given("page_server") is None
    assert given("header") is None  # the images tell
    assert given("background") is True
    assert given("options").readahead == 2 << 20
    arguments = ["--page-server", "host", "--port", "27", "--criu", "4.2", "--no-background", "--readahead", "64K"]
    assert cli.main(["lazy-pages", "-D", str(tmp_path), *arguments]) == 0
    assert given("page_server") == ("host", 27)
    assert given("header") == HEADER_4_2
    assert not given("background")
    assert given("options").readahead == 64 << 10
    assert cli.main(["lazy-pages", "-D", str(tmp_path), "--criu", "4.1"]) == 0
    assert given("header") == HEADER_4_1


@pytest.mark.parametrize(
    "arguments", [["--page-server", "host"], ["--port", "27"], ["--criu", "3"], ["-W", "/no/where"]]
)
def test_wrong_options(tmp_path: Path, arguments: list[str]) -> None:
    """Wrong usage: status 2."""
    assert cli.main(["lazy-pages", "-D", str(tmp_path), *arguments]) == 2


@pytest.mark.parametrize(
    ("arguments", "signals", "words"),
    [
        ([], 1, "SIGTERM: no process has come"),
        (["--page-server", "host", "--port", "27"], 2, "SIGTERM: missing pages are lost"),
    ],
)
def test_signals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    arguments: list[str],
    signals: int,
    words: str,
) -> None:
    """One ends the command; with a page server, whose pages come through it, the second."""
    monkeypatch.setattr(Service, "signals", signals)
    assert cli.main(["lazy-pages", "-D", str(tmp_path), *arguments]) == 1
    assert words in caplog.text


def test_errors_are_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that could not be had."""
    monkeypatch.setattr(Service, "errors", (ValueError("no"),))
    assert cli.main(["lazy-pages", "-D", str(tmp_path)]) == 1
