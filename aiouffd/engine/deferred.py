"""Runs that the kernel does not accept now: EAGAIN while the layout is changing, ENOMEM while memory is short.

Nothing makes the descriptor readable when that has passed, so they are tried again on a timer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiouffd.engine.runs import Op

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aiouffd.engine.runs import Run

__all__ = ["Deferred", "DeferredRun"]

_REPORTED_AFTER_NS = 5_000_000_000
"""After so long a deferred run is reported. A failed mremap can leave EAGAIN for ever on kernels before mid-2026."""
_REPORTED_AGAIN_NS = 60_000_000_000


class DeferredRun:
    """A run that waits to be tried again.

    Attributes:
        run: what is to be done.
        since_ns: when it was put off first.
    """

    __slots__ = ("_due_ns", "run", "since_ns")

    def __init__(self, run: Run, since_ns: int, due_ns: int) -> None:
        self.run: Run = run
        self.since_ns: int = since_ns
        self._due_ns = due_ns

    def is_due(self, now_ns: int) -> bool:
        """Tell whether it has waited so long that it is to be reported (again)."""
        if now_ns <= self._due_ns:
            return False
        self._due_ns = now_ns + _REPORTED_AGAIN_NS
        return True

    def with_run(self, run: Run) -> DeferredRun:
        """Return the same for a part of the run."""
        return DeferredRun(run, self.since_ns, self._due_ns)


class Deferred:
    """The runs of one space that wait to be tried again."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[DeferredRun] = []

    def add(self, run: Run, now_ns: int) -> bool:
        """Put a run off; False where one that waits covers it: its toucher has faulted anew (a signal, a WAKE)."""
        if any(other.run.covers(run) for other in self._waiting):
            return False
        self._waiting.append(DeferredRun(run, now_ns, now_ns + _REPORTED_AFTER_NS))
        return True

    def fills(self, page: int) -> bool:
        """Tell whether a run that waits fills a page: its sleepers are woken with it, whatever comes of it."""
        return any(run.op <= Op.CONTINUE and run.dst <= page < run.dst + run.left for run in self)

    def take(self) -> list[DeferredRun]:
        """Take all out, to be tried now."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def keep(self, deferred: DeferredRun) -> None:
        """Put back what was taken out and is refused again."""
        self._waiting.append(deferred)

    def revise(self, valid: Callable[[Run], Iterable[Run]]) -> None:
        """Replace each run by what is left of it after a change of the layout."""
        self._waiting = [item.with_run(part) for item in self._waiting for part in valid(item.run)]

    def clear(self) -> None:
        """Forget all."""
        self._waiting.clear()

    def __iter__(self) -> Iterator[Run]:
        return (item.run for item in self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)
