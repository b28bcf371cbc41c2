"""`BufferSource`: it keeps hold of what it serves, whatever the buffer's shape."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

import aiouffd
from aiouffd.sources.resolve import as_source


def test_the_buffer_cannot_be_resized_under_its_address() -> None:
    """A bytearray that is served refuses to move: `locate` has given its address away."""
    data = bytearray(b"x" * 4096)
    source = aiouffd.BufferSource(data)
    with pytest.raises(BufferError):
        data.extend(bytes(1 << 20))
    assert source.size == 4096


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (0,)])
@pytest.mark.parametrize("dtype", ["float16", "i4,f8"])
def test_arrays_of_any_shape_and_type(shape: tuple[int, ...], dtype: str) -> None:
    """The bytes as they lie in memory, also of structured and of empty arrays."""
    array = np.ones(shape, dtype)
    source = aiouffd.BufferSource(array)
    assert source.size == array.nbytes
    assert bytes(source.read_nowait(0, source.size)) == array.tobytes()


def test_an_mmap_is_a_buffer() -> None:
    """It has a `size` and a `read` as a source has, and yet is none."""
    with mmap.mmap(-1, 4096) as memory:
        source = as_source(memory)
        assert isinstance(source, aiouffd.BufferSource)
        assert source.size == 4096
        del source


def test_what_is_neither_is_said_so() -> None:
    """A TypeError that names what can be given."""
    with pytest.raises(TypeError, match="source"):
        as_source(object())
