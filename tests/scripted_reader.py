"""What stands for a reader of messages, where a test says what it finds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from aiouffd.native.reader import Outcome

__all__ = ["ScriptedReader"]


class ScriptedReader:
    """Stands for a reader: what it is asked, and what it finds."""

    def __init__(self, *found: tuple[Outcome, int, int, int]) -> None:
        self.found = list(found)
        self.asked: list[tuple[int, bool, bool]] = []

    def run(self, turn_ns: int, *, came: bool, once: bool, fd: int = -1) -> tuple[Outcome, Any]:
        """Find the next of it; then nothing."""
        self.asked.append((turn_ns, came, once))
        outcome, fd, events, error = self.found.pop(0) if self.found else (Outcome.IDLE, -1, 0, 0)
        return outcome, SimpleNamespace(fd=fd, length=0, events=events, error=error)

    def only(self, _fd: int) -> None:
        """Take no note."""

    turns = dismiss = only

    def end(self) -> None:
        """Take no note."""
