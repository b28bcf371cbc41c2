"""Element types by their names."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from aiouffd.formats.dtypes import BITS, numpy_dtype, torch_dtype

FOREIGN = [name for name in BITS if name.startswith(("bfloat", "float8"))]


@pytest.mark.parametrize("name", sorted(BITS.keys() - set(FOREIGN)))
def test_numpys_types(name: str) -> None:
    """Of the size that the table says, in the order of bytes that files have."""
    found = numpy_dtype(name)
    assert found == np.dtype(name).newbyteorder("<")
    assert found.itemsize * 8 == BITS[name]


@pytest.mark.parametrize("name", FOREIGN)
def test_types_that_numpy_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ml_dtypes has them; without it the error says what to do."""
    if importlib.util.find_spec("ml_dtypes") is not None:
        assert numpy_dtype(name).itemsize * 8 == BITS[name]
        assert numpy_dtype(name).name == name
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=rf"numpy has no {name}: install ml_dtypes, or use tensor\(\) or raw\(\)"):
        numpy_dtype(name)


def test_a_type_of_numpy_stays() -> None:
    """Records, and other orders of bytes."""
    for dtype in (np.dtype(">f4"), np.dtype([("a", "<i2")])):
        assert numpy_dtype(dtype) == dtype


def test_torchs_types() -> None:
    """Torch has each of them, and no records, texts and other orders of bytes."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    assert {name: torch.empty(1, dtype=torch_dtype(name)).element_size() * 8 for name in BITS} == BITS
    assert torch_dtype(np.dtype("<f4")) == torch_dtype("float32")
    for dtype in (np.dtype(">f4"), np.dtype([("a", "<i2")]), np.dtype("<U3"), "float"):
        with pytest.raises(TypeError, match="has no type"):
            torch_dtype(dtype)
