"""What was written to memory, where a program ends in its block, or with a region that is mapped."""

from __future__ import annotations

import atexit
import ctypes
import logging
import weakref
from typing import TYPE_CHECKING

from aiouffd.errors import ClosedError, UffdError

if TYPE_CHECKING:
    from aiouffd.monitor.entered import Entered

__all__ = ["save_at_exit"]

log: logging.Logger = logging.getLogger("aiouffd")

_unleft: weakref.WeakSet[Entered] = weakref.WeakSet()


def save_at_exit(monitor: Entered) -> None:
    """Have what is written of a Monitor that writes back be in its source when the program ends, if it is not left."""
    if not _unleft:
        atexit.unregister(_save)
        atexit.register(_save)  # behind those of the engines, and so called before them
    _unleft.add(monitor)


def _save() -> None:
    for monitor in list(_unleft):
        if not monitor.serves_here:
            continue
        try:
            region = monitor.region
            # The interpreter would unmap it, and what is unmapped is saved no more. A thread may write until the end.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(region))
            monitor.flush_sync()
        except ClosedError:  # a thread is leaving it
            continue
        except (UffdError, RuntimeError) as error:
            log.error("%r was not left when the program ended, and is not saved: %s", monitor, error)  # noqa: TRY400
