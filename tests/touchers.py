"""The C functions of `touchers.c`: `free` are called without the GIL, `held` with it."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


@cache
def _built() -> str:
    directory = Path(tempfile.gettempdir()) / "aiouffd-tests"
    directory.mkdir(exist_ok=True)
    built = directory / f"touchers-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
            pass
        subprocess.run(["cc", "-O1", "-Wall", "-shared", "-fPIC", "-pthread", "-o", file.name, SOURCE], check=True)
        Path(file.name).rename(built)
    return str(built)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.errno_after.argtypes = [ctypes.c_void_p]
    library.sum.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.sum_in_threads.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
    library.raise_and_touch.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p, ctypes.c_uint64]
    library.raise_and_touch.restype = ctypes.py_object
    for name in ("sum", "sum_in_threads", "sigbus"):
        getattr(library, name).restype = ctypes.c_uint64
    for name in ("probe", "pestered_touch"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    return library


@cache
def free() -> ctypes.CDLL:
    """Return the functions, called without the GIL."""
    return _declared(ctypes.CDLL(_built()))


@cache
def held() -> ctypes.CDLL:
    """Return the functions, called with the GIL held; a pending exception is raised."""
    return _declared(ctypes.PyDLL(_built()))
