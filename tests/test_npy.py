"""`.npy` files on a region."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from array_files import DAMAGES, damage, npy, refuses_or_reads, region_of
from hypothesis import given
from hypothesis import strategies as st

import aiouffd
from aiouffd.formats import Npy

ARRAYS = [
    np.arange(24.0).reshape(2, 3, 4),
    np.asfortranarray(np.arange(24, dtype=">i2").reshape(2, 3, 4)),
    np.array(7, np.uint8),
    np.zeros((0, 3), np.float16),
    np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
    np.array(["one", "three"]),
    np.arange(12).reshape(3, 4)[:, ::2],
]


@pytest.mark.parametrize("array", ARRAYS, ids=str)
def test_what_numpy_has_written(array: Any) -> None:
    """Is the same array, on the region."""
    region = region_of(npy(array))
    file = Npy(region)
    assert file.array.dtype == array.dtype
    assert file.array.shape == array.shape
    assert np.array_equal(file.array, array)
    assert list(file) == ["array"]
    if array.size:
        assert file.array.ctypes.data == region.address + file.info("array").start
        file.array.flat[0] = file.array.flat[-1]
        assert np.array_equal(file.array.flat[0], array.flat[-1])


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_each_version(version: tuple[int, int]) -> None:
    """The third has names in UTF-8."""
    import io

    array = np.array([(1,)], dtype=[("ü" if version == (3, 0) else "u", "<i4")])
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    assert Npy(region_of(file.getvalue())).array.dtype == array.dtype


def with_header(text: str) -> bytes:
    """Return a file whose header is this."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin-1") + bytes(64)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the magic"),
        (b"PK\3\4" * 9, "is no .npy file"),
        (b"\x93NUMPY\x04\x00" + bytes(99), "is no .npy file"),
        (npy(np.arange(9))[:-1], "72 bytes, and only 71"),
        (npy(np.array([{}], object), allow_pickle=True), "Python objects"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31), "10000 are the most"),
        (with_header("("), "not understood"),
        (with_header("{'descr': '<f4', 'shape': (1,)}"), "not understood"),
        (with_header("{'descr': 'wrong', 'fortran_order': False, 'shape': (1,)}"), "not understood"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': [1]}"), "its shape"),
        (with_header("{'descr': '<f4', 'fortran_order': 1, 'shape': (1,)}"), "Fortran"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), "shape"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 70,)}"), "not understood"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999999999,)}"), "no memory"),
        (with_header("{'descr': '|V0', 'fortran_order': False, 'shape': (1,)}"), "no bytes"),
        (with_header("(" * 9000), "not understood"),
        (with_header("-" * 9000 + "1"), "not understood"),
    ],
    ids=range(17),
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    """With an error that says why."""
    with pytest.raises(aiouffd.FormatError, match=reason):
        Npy(region_of(data))


@given(st.sampled_from(ARRAYS), DAMAGES, st.integers(0, 300))
def test_damaged_files(array: Any, damages: list[tuple[int, bytes]], cut: int) -> None:
    """Are refused or read, and nothing behind the file is touched."""
    refuses_or_reads(Npy, damage(npy(array), damages, cut))


@given(st.text(alphabet="{}[](),:'descr<f84fortran_orderFalse shape0123456789-", max_size=200))
def test_any_header(text: str) -> None:
    """Of any text."""
    refuses_or_reads(Npy, with_header(text))
