"""When a process that dies again and again is given up."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CALM", "DEATHS", "KILLED", "Deaths"]

DEATHS: Final = 5
"""So many deaths with no fault resolved between them are enough."""

KILLED: Final = 10.0
"""Seconds without a resolved fault, until deaths by SIGKILL are enough, too."""

CALM: Final = 60.0
"""A process that has lived for so many seconds, and was asked for nothing, has not died of what it was asked for."""

_PAUSE: Final = 0.5


class Deaths:
    """Counts the deaths of a process and its successors, since the last fault that was resolved.

    A process that crashes is given up after the fifth time. SIGKILL comes from outside: an operator, a test, the kernel
    that is short of memory. On a busy machine it can come five times before a successor has had its turn, so it counts
    only where it goes on for ten seconds.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._progress = -1
        self._since = 0.0
        self.count: int = 0
        self._crashes = 0

    def add(self, code: int, progress: int, *, calm: bool = False) -> bool:
        """Count a death; tell whether the process is to be given up.

        Args:
            code: as `Popen.returncode`.
            progress: the number of faults that have been resolved.
            calm: it has not died of what it was asked for.
        """
        if progress != self._progress or calm:
            self._progress, self._since = progress, self._clock()
            self.count = self._crashes = 0
        self.count += 1
        self._crashes += code != -signal.SIGKILL
        return self._crashes >= DEATHS or (self.count >= DEATHS and self._clock() - self._since >= KILLED)

    @property
    def pause(self) -> float:
        """Seconds until a successor is to be started."""
        return _PAUSE if self.count >= DEATHS else 0.0
