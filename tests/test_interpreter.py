"""`pager.client.interpreter`: which program a pager runs in."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from aiouffd.errors import PagerStartError
from aiouffd.pager.client.interpreter import SWITCH, command


def test_the_interpreter_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is not searched; what this interpreter does not look at is passed on."""
    monkeypatch.delenv(SWITCH, raising=False)
    assert command()[:2] == [sys.executable, "-P"]

    class Isolated:
        isolated = 1

    class Strict:
        isolated, ignore_environment, no_user_site = 0, 1, 1

    monkeypatch.setattr(sys, "flags", Isolated())
    assert command() == [sys.executable, "-P", "-I"]
    monkeypatch.setattr(sys, "flags", Strict())
    assert command() == [sys.executable, "-P", "-E", "-s"]


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("frozen", True, "frozen"),
        ("executable", None, "embeds"),
        ("executable", "", "embeds"),
        ("executable", "/usr/bin/uwsgi", "uwsgi"),
        ("executable", "/opt/app/blender", "blender"),
    ],
)
def test_a_program_that_is_no_interpreter_is_not_started(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any, reason: str
) -> None:
    """It would start itself, without end. The error says why, and what to do; the environment can name another."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(sys, attribute, value, raising=False)
    with pytest.raises(PagerStartError, match=rf"{reason}.*{SWITCH}.*InThread"):
        command()
    monkeypatch.setenv(SWITCH, "/usr/bin/python3")
    assert command()[0] == "/usr/bin/python3"
