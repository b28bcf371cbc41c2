"""Files of arrays for tests: made here, and damaged."""

from __future__ import annotations

import contextlib
import io
import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

import aiouffd

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiouffd.formats import ArrayFile

__all__ = ["damage", "npy", "npz", "refuses_or_reads", "region_of", "safetensors"]

DAMAGES = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.one_of(st.binary(min_size=1, max_size=9), st.just(b"\xff" * 8))), max_size=4
)
"""What `damage` takes: bytes that come in place of others."""


def region_of(data: bytes) -> aiouffd.Region:
    """Return a region with some bytes, which nobody serves: it needs no userfaultfd."""
    region = aiouffd.Region(max(len(data), 1))
    region[: len(data)] = data
    return region


def npy(array: Any, **options: Any) -> bytes:
    """Return what numpy.save writes."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(*, compressed: bool = False, **arrays: Any) -> bytes:
    """Return what numpy.savez writes."""
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a file with a header, which is JSON or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensors(arrays: Mapping[str, Any], kinds: Mapping[str, str]) -> bytes:
    """Return a safetensors file of arrays."""
    header, data = {}, b""
    for name, array in arrays.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {"dtype": kinds[name], "shape": array.shape, "data_offsets": [begin, len(data)]}
    return safetensors(header, data)


def damage(data: bytes, damages: list[tuple[int, bytes]], cut: int) -> bytes:
    """Return a file with other bytes here and there, cut at its end."""
    changed = bytearray(data)
    for at, other in damages:
        at %= len(changed)  # noqa: PLW2901
        changed[at : at + len(other)] = other
    return bytes(changed[: max(1, len(changed) - cut)])


def refuses_or_reads(kind: Callable[[aiouffd.Region], ArrayFile], data: bytes) -> None:
    """A file of any bytes is a FormatError, or its arrays are within it; nothing else is raised."""
    region = region_of(data)
    with contextlib.suppress(aiouffd.FormatError):
        file = kind(region)
        for name in file:
            with contextlib.suppress(aiouffd.FormatError):
                entry = file.info(name)
                assert 0 <= entry.start <= entry.start + entry.length <= len(region)
                assert len(file.raw(name)) == entry.length
                with contextlib.suppress(TypeError):  # numpy has no bfloat16
                    assert file[name].shape == entry.shape
                    file[name].tobytes()
                file.prefetch_tensor_sync(name)
