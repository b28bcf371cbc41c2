"""How far memory has come, and how it is shown to people."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from aiouffd.report.words import size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Meter", "Progress", "Show", "shown"]

_RECENT: Final = 10.0  # seconds that a rate is taken over
_LINES: Final = 5.0  # seconds between two lines of a log


@attrs.frozen
class Progress:
    """How much of some memory has come.

    Attributes:
        total: bytes.
        resident: bytes of them that have come, whatever for.
        rate: bytes per second, over the looks of the last ten seconds; 0.0 at the first.
        remaining: seconds until all has come at this rate; None: unknown, since nothing comes.
    """

    total: int
    resident: int
    rate: float
    remaining: float | None

    def __str__(self) -> str:
        """For a line of a log."""
        share = 100 * self.resident // self.total if self.total else 100
        left = f", {self.remaining:.0f} s left" if self.remaining else ""
        rate = f", {size(self.rate)}/s" if self.rate or self.remaining is None else ""  # of one look there is none
        return f"{size(self.resident)} of {size(self.total)} ({share} %){rate}{left}"


Show: TypeAlias = "bool | Callable[[Progress], object]"
"""Whether progress is shown on standard error, or who is told of it."""


class Meter:
    """Makes progress of looks.

    Args:
        total: bytes.
        clock: seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = monotonic) -> None:
        self._total = total
        self._clock = clock
        self._looks: deque[tuple[float, int]] = deque()

    def look(self, resident: int) -> Progress:
        """Return the progress, now that so many bytes have come."""
        now = self._clock()
        while len(self._looks) > 1 and now - self._looks[0][0] > _RECENT:
            self._looks.popleft()
        self._looks.append((now, resident))
        since, before = self._looks[0]
        rate = max(0.0, (resident - before) / (now - since)) if now > since else 0.0
        left = self._total - resident
        return Progress(self._total, resident, rate, 0.0 if not left else left / rate if rate else None)


@contextlib.contextmanager
def shown(show: Show, what: str) -> Iterator[Callable[[Progress], object]]:
    """Give what is called with each look: it draws a bar on a terminal, or writes lines to a log.

    Args:
        show: True, or a function that is given instead.
        what: is coming.
    """
    if callable(show):
        yield show
        return
    if sys.stderr is not None and sys.stderr.isatty():
        try:
            import rich.console  # noqa: PLC0415 - an extra
            import rich.progress as bars  # noqa: PLC0415 - as well
        except ImportError:
            pass
        else:
            columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.DownloadColumn(binary_units=True))
            console = rich.console.Console(stderr=True)
            more = (bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
            with bars.Progress(*columns, *more, console=console) as bar:
                task = bar.add_task(what)
                yield lambda now: bar.update(task, total=now.total, completed=now.resident)
            return
    yield _lines(what)


def _lines(what: str) -> Callable[[Progress], None]:
    due = monotonic() + _LINES

    def line(now: Progress) -> None:
        nonlocal due
        if (monotonic() >= due or now.resident == now.total) and sys.stderr is not None:
            due = monotonic() + _LINES
            sys.stderr.write(f"aiouffd: {what}: {now}\n")
            sys.stderr.flush()

    return line
