"""What a read spends its time on, step by step: so that somebody can be told why a page was slow.

The flight of a page begins to note steps in its task. Whatever it awaits adds to them, sources included: tasks that it
starts inherit where they are noted. Nobody else pays more than one look.
"""

from __future__ import annotations

from contextvars import ContextVar
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Step", "Steps", "begin", "cause_of", "current", "noted", "spent"]

Step: TypeAlias = tuple[str, int, int, dict[str, Any]]
"""What it was, when it began and when it ended (`perf_counter_ns`), and its details: plain values.

`queue`: it waited for its turn, since enough was under way; `read`: one try of the source; `retry`: a pause between two
tries; `chunk`: chunks of a snapshot that lie together; `decompress`: their frames; `handler`: a call of it.
"""
Steps: TypeAlias = list[Step]

_steps: ContextVar[Steps | None] = ContextVar("aiouffd_steps", default=None)
_CAUSES = ("queue", "retry", "decompress", "handler")  # `read` and `chunk` have others in them


def begin() -> Steps:
    """Note the steps of this task from now on, in the list that is returned."""
    steps: Steps = []
    _steps.set(steps)
    return steps


def current() -> Steps | None:
    """Return where the steps of this task are noted, for a thread that works for it; None: nowhere."""
    return _steps.get()


def noted(name: str, began_ns: int, steps: Steps | None = None, **details: Any) -> None:
    """Note a step that ends now."""
    steps = _steps.get() if steps is None else steps
    if steps is not None:
        steps.append((name, began_ns, perf_counter_ns(), details))


def spent(steps: Sequence[Step], name: str, since_ns: int = 0) -> int:
    """Return the nanoseconds of all steps of a name, from a time on."""
    return sum(max(ended - max(began, since_ns), 0) for each, began, ended, _ in steps if each == name)


def cause_of(steps: Sequence[Step], since_ns: int, until_ns: int) -> str:
    """Return what took most of a time: `queue`, `retry`, `decompress` or `handler`; else it was the `source`."""
    known = {name: spent(steps, name, since_ns) for name in _CAUSES}
    name = max(_CAUSES, key=lambda each: known[each])
    return name if known[name] > max(until_ns - since_ns - sum(known.values()), 0) else "source"
