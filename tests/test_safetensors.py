"""Safetensors files on a region."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_files import DAMAGES, damage, refuses_or_reads, region_of, safetensors, tensors
from hypothesis import given
from hypothesis import strategies as st

import aiouffd
from aiouffd.formats import Safetensors

ARRAYS: dict[str, Any] = {
    "a": np.arange(6, dtype=np.float16).reshape(2, 3),
    "none": np.zeros((0, 3)),
    "one": np.array(3.5),
    "bits": np.arange(4, dtype=np.uint16),
    "flags": np.array([True, False]),
}
KINDS = {"a": "F16", "none": "F64", "one": "F64", "bits": "BF16", "flags": "BOOL"}
FILE = tensors(ARRAYS, KINDS)


def test_the_arrays_are_on_the_region() -> None:
    """By name, with shape and type; what is written to one is in the region."""
    region = region_of(FILE)
    file = Safetensors(region)
    assert list(file) == list(ARRAYS)
    for name in ("a", "none", "one", "flags"):
        assert np.array_equal(file[name], ARRAYS[name])
        assert file[name].dtype == ARRAYS[name].dtype
    file["a"][1, 2] = 9
    assert region[file.info("a").start + 10 :][:2] == np.float16(9).tobytes()
    assert file.info("bits").kind == "BF16"
    assert bytes(file.raw("bits")) == ARRAYS["bits"].tobytes()
    assert "a" in file
    assert "b" not in file
    with pytest.raises(KeyError):
        file.info("b")


def test_what_the_package_has_written() -> None:
    """The reference writer, with metadata."""
    package = pytest.importorskip("safetensors.numpy", reason="the package safetensors is not installed")
    arrays = {name: ARRAYS[name] for name in ("a", "none", "one", "flags")}
    file = Safetensors(region_of(package.save(arrays, {"format": "np"})))
    assert file.metadata == {"format": "np"}
    assert all(np.array_equal(file[name], array) for name, array in arrays.items())
    assert file.keys() == arrays.keys()


def test_tensors_of_torch() -> None:
    """Types that numpy lacks as well, on the region."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    region = region_of(FILE)
    file = Safetensors(region)
    found = file.tensor("bits")
    assert (found.dtype, found.shape) == (torch.bfloat16, (4,))
    assert found.data_ptr() == region.address + file.info("bits").start
    assert file.tensor("none").shape == (0, 3)
    assert file.tensor("one").item() == 3.5
    assert torch.equal(file.tensor("a"), torch.from_numpy(ARRAYS["a"]))
    eight = Safetensors(region_of(safetensors({"x": said("F8_E4M3", [2], 0, 2)}, b"\x38\x40")))
    assert eight.tensor("x").float().tolist() == [1.0, 2.0]


def said(dtype: Any, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    """Return what a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"1234", "the length of the header has 8 bytes"),
        (safetensors({}, length=1 << 63), "100000000 are the most"),
        (safetensors({}, length=99), "the header has 99 bytes"),
        (safetensors(b"{"), "no JSON"),
        (safetensors(b"\xff\xff"), "no JSON"),
        (safetensors(b"[" * 100_000), "no JSON"),
        (safetensors(b'{"a":' * 100_000), "no JSON"),
        (safetensors(b"[]"), "no object"),
        (safetensors(b'{"a": 1, "a": 2}'), "occurs twice"),
        (safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "no JSON"),
        (safetensors({"__metadata__": 1}), "__metadata__"),
        (safetensors({"a": 1}), "has no dtype"),
        (safetensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"1"), "has no dtype"),
        (safetensors({"a": said("F4", [1], 0, 1)}, b"1"), "type 'F4'"),
        (safetensors({"a": said([], [1], 0, 1)}, b"1"), "not known here"),
        (safetensors({"a": said("U8", [1], False, 1)}, b"1"), "lies in"),
        (safetensors({"a": said("U8", [1], 1, 0)}, b"1"), "lies in"),
        (safetensors({"a": said("U8", [1], -1, 0)}, b"1"), "lies in"),
        (safetensors({"a": said("U8", [True], 0, 1)}, b"1"), "shape"),
        (safetensors({"a": said("U8", [1 << 32, 1 << 32], 0, 1)}, b"1"), "no memory"),
        (safetensors({"a": said("U8", [2], 0, 1)}, b"1"), "takes 2 bytes, and has 1"),
        (safetensors({"a": said("U8", [2], 0, 2)}, b"1"), "the tensors end here"),
        (safetensors({"a": said("U8", [1], 0, 1)}, b"12"), "the tensors end here"),
        (safetensors({"a": said("U8", [1], 1, 2)}, b"12"), "'a' begins here"),
        (safetensors({"a": said("U8", [2], 0, 2), "b": said("U8", [2], 1, 3)}, b"123"), "'b' begins here"),
    ],
    ids=range(25),
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    """With an error that says why, and names the file."""
    with pytest.raises(aiouffd.FormatError, match=reason) as caught:
        Safetensors(region_of(data))
    assert caught.value.file.startswith("<Region")


@given(DAMAGES, st.integers(0, 300))
def test_damaged_files(damages: list[tuple[int, bytes]], cut: int) -> None:
    """Are refused or read."""
    refuses_or_reads(Safetensors, damage(FILE, damages, cut))


NUMBERS = st.one_of(st.integers(0, 40), st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=3))
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F0", 7]),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS),
        "data_offsets": st.one_of(st.tuples(NUMBERS, NUMBERS), st.lists(NUMBERS, max_size=3)),
    }
)


@given(st.dictionaries(st.text(max_size=4), st.one_of(TENSOR, NUMBERS), max_size=4), st.binary(max_size=99))
def test_any_header(header: dict[str, Any], data: bytes) -> None:
    """Overlapping tensors, gaps, huge numbers, and what are no numbers."""
    refuses_or_reads(Safetensors, safetensors(header, data))
