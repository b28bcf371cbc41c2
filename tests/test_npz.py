"""`.npz` files on a region."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import pytest
from array_files import DAMAGES, damage, npz, refuses_or_reads, region_of
from hypothesis import given
from hypothesis import strategies as st

import aiouffd
from aiouffd.formats import Npz

ARRAYS: dict[str, Any] = {"a": np.arange(5), "b/c": np.asfortranarray(np.eye(3)), "d": np.float32(7)}
FILE = npz(**ARRAYS)


def test_what_numpy_has_written() -> None:
    """The same names and arrays; the mapping reads no member before it is asked for."""
    file = Npz(region_of(FILE))
    assert list(file) == list(ARRAYS)
    assert len(file) == 3
    assert "a" in file
    assert "a.npy" not in file
    assert not file._entries
    for name, array in ARRAYS.items():
        assert np.array_equal(file[name], array)
    with pytest.raises(KeyError):
        file.info("e")


def test_a_compressed_file() -> None:
    """Its names are there; an array says that it is compressed."""
    file = Npz(region_of(npz(compressed=True, **ARRAYS)))
    assert list(file) == list(ARRAYS)
    with pytest.raises(aiouffd.FormatError, match=r"'a\.npy' is compressed"):
        file["a"]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as target:
        target.writestr("a/data.pkl", b"")
    with pytest.raises(aiouffd.FormatError, match="none of its 1 members is"):
        Npz(region_of(content.getvalue()))


@given(DAMAGES, st.integers(0, 40))
def test_damaged_files(damages: list[tuple[int, bytes]], cut: int) -> None:
    """Are refused or read."""
    refuses_or_reads(Npz, damage(FILE, damages, cut))
