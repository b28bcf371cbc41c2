"""The native part, in C: what must work without Python, in a signal handler or while no thread can have the GIL.

Layout: `build` compiles the C files on installation, and `python -m aiouffd.native` where they lie. The C files, each
of which uses only those before it: `common` (time, futexes, messages), `gil`, `uffd` (the kernel's structures), `table`
(the regions served in the faulting thread), `plain` (placing bytes that are in memory), `chain` (the other handlers of
SIGBUS), `ask` (waiting for the event loop), `crash_notes` (what is said about a fatal signal), `signal` (the handlers),
`watchdog` with `watch_servers` and `watch_loop` (ends a process that waits for ever), `reader` (reads descriptors and
serves plain faults without the GIL), `copies` (many COPYs, protections, reads or writes by one call), `dropper` (drops
private pages for a pager). The modules `crash_notes`, `faults`, `reader`, `watchdog` and `dropper` declare their
functions.

This module loads the library on first use, by ctypes. It is missing where there was no C compiler, and is not used in a
process that has AIOUFFD_NATIVE=0 in its environment; only the modules that use it then fail, with NativePartError.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

from aiouffd.errors import NativePartError
from aiouffd.native import build

__all__ = ["holding", "is_known", "library", "reason"]

SWITCH = "AIOUFFD_NATIVE"
"""The environment variable: 0 leaves the native part out."""
_BUILD = (
    "install a C compiler (the Debian package gcc, for example), and then reinstall aiouffd or run"
    " `python -m aiouffd.native`"
)


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or why there is none."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0 is set: unset it"
    path = f"{build.HERE}/{build.NAME}"
    if not os.path.exists(path):  # noqa: PTH110 - as in build
        return None, f"aiouffd was installed without a C compiler: {_BUILD}"
    try:
        # CDLL, which releases the GIL during a call: a call may wait for handlers that want it.
        loaded = ctypes.CDLL(path)
        built = int(ctypes.c_uint32(loaded.aiouffd_fingerprint()).value)
    except (OSError, AttributeError) as error:
        return None, _told(f"the native part of aiouffd cannot be loaded ({error}): {_BUILD}")
    if built != build.fingerprint():
        return None, _told(
            f"the native part of aiouffd was built from other C files than those that are here: {_BUILD}"
        )
    _introduce(loaded)
    return loaded, ""


def _told(why: str) -> str:
    """Log, once a process, why what is there is of no use: with a pager all works without it, and nobody would know."""
    import logging  # noqa: PLC0415 - each program asks for the library, and few have another one's

    logging.getLogger("aiouffd").warning("%s. Until then Python does its work, slower", why)
    return why


def _introduce(loaded: ctypes.CDLL) -> None:
    """Tell the library where Python's functions are. It links with no Python, so that one build serves each version."""
    python: Any = ctypes.pythonapi

    def place(*names: str) -> ctypes.c_void_p:
        for name in names:
            if hasattr(python, name):
                return ctypes.cast(getattr(python, name), ctypes.c_void_p)
        return ctypes.c_void_p()

    # Since Python 3.12 this is the current thread's state; before, that of the thread that holds the GIL.
    current = place("PyThreadState_GetUnchecked", "_PyThreadState_UncheckedGet")
    mine = ctypes.c_void_p() if sys.version_info >= (3, 12) else place("PyGILState_GetThisThreadState")
    loaded.aiouffd_python.restype = None
    loaded.aiouffd_python(place("PyEval_SaveThread"), place("PyEval_RestoreThread"), current, mine)


@cache
def holding() -> ctypes.PyDLL:
    """Return the library for calls that keep the GIL; errors as for `library`."""
    library()
    return ctypes.PyDLL(f"{build.HERE}/{build.NAME}")


def library() -> ctypes.CDLL:
    """Return the library for calls that release the GIL. Each caller declares the functions that it uses.

    Raises:
        NativePartError: there is none.
    """
    loaded, why = _load()
    if loaded is None:
        raise NativePartError(why)
    return loaded


def is_known() -> bool:
    """Tell whether it was tried to load the library: what is asked from now on reads no file."""
    return bool(_load.cache_info().currsize)


def reason() -> str:
    """Return why there is no library; an empty string where there is one."""
    return _load()[1]
