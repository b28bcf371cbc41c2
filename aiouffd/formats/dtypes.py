"""Element types, by the names that torch and ml_dtypes share, and numpy as far as it has them."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["BITS", "numpy_dtype", "torch_dtype"]

BITS: Final = {
    name: bits
    for bits, names in {
        8: "bool int8 uint8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu",
        16: "int16 uint16 float16 bfloat16",
        32: "int32 uint32 float32",
        64: "int64 uint64 float64 complex64",
        128: "complex128",
    }.items()
    for name in names.split()
}
"""How large an element is."""


def numpy_dtype(dtype: Any) -> Any:
    """Return numpy's type for a name of `BITS`, little-endian; a type of numpy stays as it is.

    Raises:
        TypeError: numpy does not have it, and the package ml_dtypes, which adds it, is not installed.
    """
    import numpy as np  # noqa: PLC0415 - an extra

    if not isinstance(dtype, str):
        return np.dtype(dtype)
    if not dtype.startswith(("bfloat", "float8")):
        return np.dtype(dtype).newbyteorder("<")
    try:
        import ml_dtypes  # noqa: PLC0415 - an extra
    except ImportError:
        raise TypeError(f"numpy has no {dtype}: install ml_dtypes, or use tensor() or raw()") from None
    return np.dtype(getattr(ml_dtypes, dtype))


def torch_dtype(dtype: Any) -> Any:
    """Return torch's type for a name of `BITS` or a type of numpy.

    Raises:
        TypeError: torch does not have it.
    """
    import torch  # noqa: PLC0415 - an extra

    name = dtype if isinstance(dtype, str) else dtype.name if dtype.isnative else str(dtype)
    found = getattr(torch, name, None) if name in BITS else None
    if found is None:
        raise TypeError(f"torch {torch.__version__} has no type {name!r}")
    return found
