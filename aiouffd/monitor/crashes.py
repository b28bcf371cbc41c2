"""What standard error says when a touch of a region ends a process that could not know better."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from typing import TYPE_CHECKING

from aiouffd.native import faults, reason
from aiouffd.native.crash_notes import Note, When

if TYPE_CHECKING:
    from aiouffd.monitor.held import Held

__all__ = ["CrashNotes", "caller", "enable_tracebacks"]

_PACKAGE = __file__.removesuffix("monitor/crashes.py")


def enable_tracebacks(*, of_all: bool) -> None:
    """Enable faulthandler, so that a page that cannot be had ends with the line that touched it.

    Not where SIGBUS has a handler: that is kept. Call it before ours is installed, and in the caller's thread, which
    gets an alternate stack by that.

    Args:
        of_all: of all threads: where the loop runs here, whoever waits for whom is to be seen when the process is ended
            since it hangs. CPython reads the frames of threads that run on meanwhile, and can end by SIGSEGV over that:
            so elsewhere it is the thread with the signal alone.
    """
    free = signal.getsignal(signal.SIGBUS) is signal.SIG_DFL if reason() else faults.handler() == 0
    if free and not faulthandler.is_enabled() and sys.stderr is not None:
        with contextlib.suppress(RuntimeError, ValueError, OSError):  # it has no descriptor: an IDE's, a notebook's
            faulthandler.enable(all_threads=of_all)


def caller() -> str:
    """Return the line that has called into this package: "FILE:LINE, in FUNCTION"."""
    frame = sys._getframe(1)  # noqa: SLF001 - `inspect` would read the source files
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, contextlib.__file__)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"


class CrashNotes:
    """What is said about touches of one region, from entering a Monitor until the region is closed or settled as zeros.

    Args:
        held: the region that is served.
        monitor: how to call its Monitor.
        children: forked children have the region.
    """

    def __init__(self, held: Held, monitor: str, *, children: bool) -> None:
        self._held = held
        self._monitor = monitor
        region = held.region
        self._note = Note(region.address, region.mapped_length)
        if not children:
            self._note.say(
                When.ABSENT,
                f"{monitor} serves it for process {os.getpid()}; a forked child does not have it. Use the default"
                ' engine without fork="dontfork" (it needs CAP_SYS_PTRACE), or open it in the child.',
            )
        region.annotate(self._note)

    def left(self, where: str) -> None:
        """Say that a touch of a missing page is SIGBUS from now on."""
        self._note.say(
            When.LEFT,
            f"{self._monitor} was left at {where}; since then a touch of a missing page is SIGBUS. Touch it inside the"
            ' block, use `aiouffd.map`, which has no block, or leave it with on_exit="populate".',
        )

        self._note.say(
            When.ABSENT,
            f"{self._monitor} was left at {where}; a forked child does not have the pages that were missing then. Touch"
            ' them before, or leave it with on_exit="populate".',
        )

    def lost(self) -> None:
        """Say that a touch of a missing page is SIGBUS from now on, since nobody serves the region any more."""
        self._note.say(
            When.LEFT,
            f"{self._monitor} has lost what served it, as `Monitor.check()` tells; since then a touch of a missing page"
            " is SIGBUS.",
        )
        self._note.say(
            When.ABSENT,
            f"{self._monitor} has lost what served it, as `Monitor.check()` tells; what was missing then is not there.",
        )

    def close(self) -> None:
        """Say nothing any more."""
        self._held.region.annotate(None)
