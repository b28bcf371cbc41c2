"""What is kept of a Monitor where a program ends in its block, or with a region that is mapped."""

from __future__ import annotations

import atexit
import ctypes
import logging
import weakref
from functools import partial
from typing import TYPE_CHECKING

from aiouffd.errors import ClosedError, UffdError

if TYPE_CHECKING:
    from aiouffd.monitor.entered import Entered
    from aiouffd.monitor.recording import Tracing

__all__ = ["save_at_exit"]

log: logging.Logger = logging.getLogger("aiouffd")

_unleft: weakref.WeakKeyDictionary[Entered, Tracing | None] = weakref.WeakKeyDictionary()


def save_at_exit(monitor: Entered, recording: Tracing | None) -> None:
    """Have what was written and recorded be in its file when the program ends, if the Monitor is not left."""
    atexit.unregister(_save)
    atexit.register(_save)  # behind those of all engines that are imported by now, and so called before them
    _unleft[monitor] = recording


def _save() -> None:
    for monitor, recording in list(_unleft.items()):
        if not monitor.serves_here:
            continue
        for save in (monitor.writes_back and partial(_flush, monitor), recording and recording.end_at_exit):
            try:
                if save:
                    save()
            except ClosedError:  # a thread is leaving it
                continue
            except (UffdError, OSError, RuntimeError) as error:
                log.error("%r was not left when the program ended, and is not saved: %s", monitor, error)  # noqa: TRY400


def _flush(monitor: Entered) -> None:
    # The interpreter would unmap it, and what is unmapped is not saved. Threads may write until the end.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(monitor.region))
    if (loop := monitor.resting_loop) is None:
        monitor.flush_sync()
    else:
        loop.run_until_complete(monitor.flush())
