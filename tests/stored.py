"""Bytes to serve, and what becomes of a source on its way to the pager."""

from __future__ import annotations

import ctypes
import os
import random
from typing import Any

from aiouffd.pager.process.serialization import pack, unpack

SIZE = 1_000_003
DATA = random.Random(11).randbytes(SIZE)


def travelled(source: Any) -> Any:
    """Return the source as it arrives in the pager."""
    data, descriptors = pack(source)
    return unpack(data, [os.dup(item.fd) for item in descriptors])


def at(address: int | None, length: int) -> bytes:
    """Return what lies at an address."""
    assert address is not None
    return ctypes.string_at(address, length)
