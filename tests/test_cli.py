"""`cli.main`: exit statuses, and errors as one line."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

import pytest

from aiouffd import UffdError
from aiouffd.cli import commands, main, run
from aiouffd.kernel.limits import limit_error, no_thread

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "aiouffd: interrupted\n"),
        (UffdError("it is so"), 1, "aiouffd: it is so\n"),
        (OSError(2, "No such file", "/x"), 1, "aiouffd: /x: No such file\n"),
        (OSError("odd"), 1, "aiouffd: odd\n"),
        (OSError(24, "?"), 1, f"aiouffd: {limit_error('the command', 24)}\n"),
        (MemoryError(), 1, f"aiouffd: {limit_error('the command', 12)}\n"),
        (RuntimeError("can't start new thread"), 1, f"aiouffd: {no_thread('a thread of the command')}\n"),
    ],
)
def test_an_error_is_a_line_and_a_status(
    raised: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --debug what a developer wants to see is raised."""

    def fail(**_: object) -> None:
        raise raised

    monkeypatch.setattr(commands.group, "main", fail)
    assert main(["demo"]) == status
    assert capsys.readouterr().err == said
    if isinstance(raised, Exception):
        with pytest.raises(type(raised)):
            main(["--debug", "demo"])


def test_a_bug_has_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no user's doing is not hidden."""

    def fail(**_: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(commands.group, "main", fail)
    with pytest.raises(RuntimeError, match="odd"):
        main(["demo"])


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    """With a sentence about it."""
    assert main(["no-such-command"]) == 2
    assert "no-such-command" in capsys.readouterr().err


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, with how to install it."""
    monkeypatch.setitem(sys.modules, "click", None)
    assert main(["doctor"]) == 2
    assert "pip install 'aiouffd[cli]'" in capsys.readouterr().err


def test_the_end_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python is not finalized; what was written is there all the same."""
    found: list[tuple[int, str]] = []
    output = io.TextIOWrapper(io.BytesIO(), write_through=False)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", ["aiouffd", "--version"])
    monkeypatch.setattr(os, "_exit", lambda status: found.append((status, output.buffer.getvalue().decode())))
    command_line: Callable[[], None] = run
    command_line()
    ((status, written),) = found
    assert status == 0
    assert written.startswith("aiouffd")
