"""The part in C: what must be done without Python, in a signal handler or while nobody gets the GIL.

Layout: `build` compiles the C files, when aiouffd is installed; `__main__` does it by hand. `faults.c`: page faults
resolved in the faulting thread; `faults.h` and `table.c`: the table of regions, and `faults` the same typed;
`signal.c`: who else has SIGBUS; `watchdog.c`, and `watchdog` the same typed: ends a process that nobody serves any
more; `common.c` and `native.h`: what they share. Here it is loaded, by ctypes, on first use. It may be missing: there
was no C compiler. Nothing else of the package needs it.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from aiouffd.errors import NativePartError
from aiouffd.native import build

__all__ = ["holding", "library", "reason"]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or why there is none."""
    path = build.HERE / build.NAME
    if not path.exists():
        return None, "aiouffd was installed without a C compiler"
    try:
        # CDLL: the GIL is free during a call, in which a thread may wait for handlers that hold it.
        loaded = ctypes.CDLL(str(path))
        built = int(ctypes.c_uint32(loaded.aiouffd_fingerprint()).value)
    except (OSError, AttributeError) as error:
        return None, f"the C part of aiouffd cannot be loaded ({error})"
    if built != build.fingerprint():
        return None, "the C part of aiouffd was built from other C files than those that are here"
    _introduce(loaded)
    return loaded, ""


def _introduce(loaded: ctypes.CDLL) -> None:
    """Tell the library where Python's functions are: it links with none, so that it serves each version."""
    python: Any = ctypes.pythonapi

    def place(*names: str) -> ctypes.c_void_p:
        for name in names:
            if hasattr(python, name):
                return ctypes.cast(getattr(python, name), ctypes.c_void_p)
        return ctypes.c_void_p()

    # Of the current thread since Python 3.12; of the thread that holds the GIL before, whichever that is.
    current = place("PyThreadState_GetUnchecked", "_PyThreadState_UncheckedGet")
    mine = ctypes.c_void_p() if sys.version_info >= (3, 12) else place("PyGILState_GetThisThreadState")
    loaded.aiouffd_python.restype = None
    loaded.aiouffd_python(place("PyEval_SaveThread"), place("PyEval_RestoreThread"), current, mine)


@cache
def holding() -> ctypes.PyDLL:
    """Return the library once more, for calls that keep the GIL; errors as for `library`."""
    library()
    return ctypes.PyDLL(str(build.HERE / build.NAME))


def library() -> ctypes.CDLL:
    """Return the library; each caller declares the functions that it uses.

    Raises:
        NativePartError: there is none.
    """
    loaded, why = _load()
    if loaded is None:
        raise NativePartError(why)
    return loaded


def reason() -> str:
    """Return why there is no library; nothing, where there is one."""
    return _load()[1]
