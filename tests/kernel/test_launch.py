"""`launch`: a pager's process is started, or it is told why not."""

from __future__ import annotations

import signal

import pytest
from processes import has_ended
from scenario import open_descriptors

import aiouffd
from aiouffd.pager.client import launch
from aiouffd.pager.client.launch import Launched
from aiouffd.pager.process.serialization import Pickles


def test_what_is_given_up_before_it_has_said_hello() -> None:
    """No process is left, and no descriptor."""
    before = open_descriptors()
    launched = Launched(Pickles.NEVER)
    assert not has_ended(launched.keeper.pid)
    assert launched.abandon() == -signal.SIGKILL
    del launched
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["/no/such/python"], "could not be started"),
        ([__file__], f"{__file__}.*Permission denied .*noexec"),
    ],
)
def test_what_cannot_be_started(command: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the command; no descriptor is left."""
    before = open_descriptors()
    monkeypatch.setattr(launch, "command", lambda: command)
    with pytest.raises(aiouffd.PagerStartError, match=words):
        Launched(Pickles.NEVER)
    assert open_descriptors() == before
