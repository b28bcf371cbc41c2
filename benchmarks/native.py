"""The C library of peers and touchers: built on demand, called through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SOURCE = Path(__file__).parent / "native" / "peers.c"


@cache
def library() -> ctypes.CDLL:
    """Build the library where this source has not been built yet; load it."""
    text = SOURCE.read_bytes()
    directory = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aiouffd-benchmarks"
    directory.mkdir(parents=True, exist_ok=True)
    built = directory / f"peers-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
            pass
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-pthread", "-o", file.name, SOURCE], check=True)
        Path(file.name).rename(built)
    peers = ctypes.CDLL(str(built))
    peers.handle.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
    peers.touch.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_uint64),
    ]
    peers.touch.restype = ctypes.c_uint64
    peers.write_pages.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64]
    peers.write_pages.restype = ctypes.c_uint64
    peers.keep_pages.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64]
    peers.serve_http.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    peers.receive_http.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_long, ctypes.c_long]
    return peers


def write(address: int, pages: np.ndarray, interval_ns: int = 0) -> float:
    """Write to pages (numbers, uint32) in this thread, without the GIL; return the seconds."""
    return float(library().write_pages(address, pages.ctypes.data, len(pages), interval_ns)) / 1e9


def touch(address: int, pages: np.ndarray, threads: int = 1, latencies: np.ndarray | None = None) -> float:
    """Touch pages (numbers, uint32) from C threads; return the seconds. A page with wrong content is an error."""
    wrong = ctypes.c_uint64()
    place = None if latencies is None else latencies.ctypes.data
    nanoseconds = library().touch(address, pages.ctypes.data, place, len(pages), threads, ctypes.byref(wrong))
    if wrong.value:
        raise AssertionError(f"{wrong.value} of {len(pages)} pages had the wrong content")
    return float(nanoseconds) / 1e9
