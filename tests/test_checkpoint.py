"""Files of `torch.save` on a region. Their pickles are made here by hand, so that torch is needed for its own part."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from array_files import DAMAGES, damage, refuses_or_reads, region_of
from hypothesis import given
from hypothesis import strategies as st

import aiouffd
from aiouffd.formats import Checkpoint
from aiouffd.formats.checkpoint import walk


class Named:
    """Pickles as a name that cannot be imported here."""

    def __init__(self, module: str, name: str) -> None:
        self.name = f"c{module}\n{name}\n".encode()


class Call:
    """Pickles as the call of a name."""

    def __init__(self, target: Named, *arguments: Any) -> None:
        self.target, self.arguments = target, arguments


class Storage:
    """Pickles as torch writes storages."""

    def __init__(self, kind: str, key: str, count: Any) -> None:
        self.said = ("storage", Named("torch", kind), key, "cpu", count)


Base: Any = pickle._Pickler  # that in Python, which can be extended


class Pickler(Base):  # type: ignore[misc]
    """Writes these."""

    def persistent_id(self, obj: Any) -> Any:
        """Return what stands for a storage."""
        return obj.said if isinstance(obj, Storage) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:  # noqa: FBT002 - the base's
        """Write one object."""
        if isinstance(obj, Named):
            self.write(obj.name)
        elif isinstance(obj, Call):
            self.save(obj.target)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def pickled(thing: Any) -> bytes:
    """Return a pickle, of protocol 2 as torch's."""
    file = io.BytesIO()
    Pickler(file, 2).dump(thing)
    return file.getvalue()


def tensor(kind: str, key: str, count: int, first: Any, shape: Any, strides: Any) -> Call:
    """Return a tensor as torch pickles it."""
    rebuild = Named("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, Storage(kind, key, count), first, shape, strides, False, OrderedDict())


def saved(content: Any, storages: dict[str, bytes], **others: bytes) -> bytes:
    """Return a file of torch.save."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("archive/data.pkl", content if isinstance(content, bytes) else pickled(content))
        for name, data in others.items():
            target.writestr(f"archive/{name}", data)
        for key, data in storages.items():
            target.writestr(f"archive/data/{key}", data)
    return file.getvalue()


ONE, ONE_MORE = (tensor("FloatStorage", "0", 12, first, (1,), (1,)) for first in (0, 1))
NUMBERS = np.arange(12, dtype=np.float32)
CONTENT = {
    "model": OrderedDict(
        w=tensor("FloatStorage", "0", 12, 0, (3, 4), (4, 1)), b=tensor("HalfStorage", "1", 2, 1, (1,), (1,))
    ),
    "epoch": 3,
    "more": [tensor("FloatStorage", "0", 12, 2, (2, 2), (1, 4)), "text", (None, 1.5)],
    "none": tensor("FloatStorage", "2", 0, 0, (0, 3), (3, 1)),
}
STORAGES = {"0": NUMBERS.tobytes(), "1": np.array([1, 2], np.float16).tobytes(), "2": b""}
FILE = saved(CONTENT, STORAGES, byteorder=b"little", version=b"3\n")


def test_tensors_are_named_by_their_way() -> None:
    """Through dicts and lists; with strides, offsets and shared storages, on the region."""
    region = region_of(FILE)
    file = Checkpoint(region)
    assert list(file) == ["model.w", "model.b", "more.0", "none"]
    assert np.array_equal(file["model.w"], NUMBERS.reshape(3, 4))
    assert file["model.b"].tolist() == [2]
    assert file["model.b"].dtype == np.float16
    assert np.array_equal(file["more.0"], [[2, 6], [3, 7]])
    assert file["none"].shape == (0, 3)
    file["model.w"][0, 2] = 99  # 2: both show it
    assert file["more.0"][0, 0] == 99
    assert region[file.info("model.w").start + 8 :][:4] == np.float32(99).tobytes()


def refused(data: bytes, reason: str) -> None:
    """A file is refused."""
    with pytest.raises(aiouffd.FormatError, match=reason):
        Checkpoint(region_of(data))


def test_no_code_of_a_file_runs() -> None:
    """What is not a part of tensors or plain containers is refused before it is called, and named."""
    for module, name in (("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch._utils", "_rebuild_xla")):
        refused(saved(Call(Named(module, name), "true"), {}), rf"an object {module}\.{name}")


def test_a_file_changes_nothing_of_ours() -> None:
    """A pickle can set attributes of what it names: not those of functions that others use."""
    state = pickle.PROTO + b"\2" + Named("torch._utils", "_rebuild_tensor_v2").name + b"}X\1\0\0\0aK\1sb."
    Checkpoint(region_of(saved(state, {})))
    assert not vars(Checkpoint._tensor_of)
    refused(saved(state.replace(b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict"), {}), "data.pkl")


def test_a_file_changes_nothing_that_was_checked() -> None:
    """Neither how long a storage is, nor what a tensor is made of."""
    longer = b"}X\6\0\0\0lengthM\0\1sb"
    for place in (b"Q", b"R"):  # behind the storage, and behind the tensor
        before, _, after = pickled(tensor("FloatStorage", "0", 12, 0, (1,), (1,))).rpartition(place)
        refused(saved(before + place + longer + after, STORAGES), "data.pkl")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "data.pkl"),
        (b"\x80\x02]", "data.pkl"),
        (tensor("FloatStorage", "9", 12, 0, (1,), (1,)), "data.pkl"),
        (tensor("FloatStorage", "0", 13, 0, (1,), (1,)), "should have 13"),
        (tensor("FloatStorage", "0", -1, 0, (1,), (1,)), "should have"),
        (tensor("OddStorage", "0", 12, 0, (1,), (1,)), "OddStorage"),
        (tensor("FloatStorage", "0", 12, 0, (13,), (1,)), "not within its storage"),
        (tensor("FloatStorage", "0", 12, 12, (1,), (1,)), "not within its storage"),
        (tensor("FloatStorage", "0", 12, 0, (2,), (12,)), "not within its storage"),
        (tensor("FloatStorage", "0", 12, -1, (1,), (1,)), "from -1"),
        (tensor("FloatStorage", "0", 12, 0, (2,), (-1,)), "strides"),
        (tensor("FloatStorage", "0", 12, 0, (2,), (1, 1)), "strides"),
        (tensor("FloatStorage", "0", 12, 0, (-2,), (1,)), "shape"),
        (tensor("FloatStorage", "0", 12, 0, (1 << 80,), (0,)), "no memory"),
        (tensor("FloatStorage", "0", 12, 0, "ab", "cd"), "shape"),
        ({(1,): 1}, "neither text nor a number"),
({"a": {"b": ONE}, "a.b": ONE_MORE}, "two tensors"),
        (b"\x80\x02Nr\x00\x00\x00\x06.", "a place 100663296"),  # of 1.5 GiB
        (tensor("FloatStorage", "0", 12, (((1,), 2),), (1,), (1,)), r"from \[tuple\]"),  # may be a tree without end
        (tensor("FloatStorage", "0", 12, 0, (((1,), 2),), (1,)), r"shape \[tuple\]"),
        (Storage("FloatStorage", "0", ((1,),)), r"no storage: .*'cpu', tuple\]"),
    ],
    ids=range(21),
)  # fmt: skip
def test_what_is_refused(content: Any, reason: str) -> None:
    """With an error that says why."""
    refused(saved(content, STORAGES), reason)


def test_other_archives() -> None:
    """TorchScript, another order of bytes, no checkpoint at all."""
    refused(saved(CONTENT, STORAGES, **{"constants.pkl": b""}), "TorchScript")
    refused(saved(CONTENT, STORAGES, byteorder=b"big"), "big-endian")
    refused(saved(CONTENT, STORAGES, **{"x/data.pkl": b""}), "2 members")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("a", b"")
    refused(file.getvalue(), "0 members")
    refused(pickle.dumps({}), "since torch 1.6; torch.load")


def test_containers() -> None:
    """Too deep, in themselves, or many times in one another: no hang, and no crash."""
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    refused(saved(deep, {}), "deep")
    itself: list[Any] = []
    itself.append(itself)
    refused(saved(itself, {}), "deep")
    many: Any = []
    for _ in range(50):
        many = [many, many]
    made = walk(many, lambda leaf, _: leaf)
    assert made[0] is made[1]
    Checkpoint(region_of(saved(many, {})))


@given(DAMAGES, st.integers(0, 40))
def test_damaged_files(damages: list[tuple[int, bytes]], cut: int) -> None:
    """Are refused or read."""
    refuses_or_reads(Checkpoint, damage(FILE, damages, cut))


@given(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=3)), min_size=1, max_size=5))
def test_damaged_pickles(damages: list[tuple[int, bytes]]) -> None:
    """Are refused or read, and run nothing."""
    refuses_or_reads(Checkpoint, saved(damage(pickled(CONTENT), damages, 0), STORAGES))


def test_what_torch_has_saved() -> None:
    """Is loaded as torch does: state dicts with their versions, parameters, views, shared memory, each type."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    base = torch.arange(100.0)
    linear = torch.nn.Linear(3, 2)
    content = {
        "model": linear.state_dict(),
        "parameter": linear.weight,
        "twice": [base, base, base[10:50:2], base.reshape(10, 10).T],
        "types": [torch.ones(2).to(kind) for kind in (torch.bfloat16, torch.uint16, torch.float8_e4m3fn, torch.bool)],
        "rest": (1, "x", None, torch.empty(0, 3), torch.tensor(5)),
    }
    torch.save(content, file := io.BytesIO())
    region = region_of(file.getvalue())
    loaded = Checkpoint(region).load()
    expected = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert str(loaded) == str(expected)
    assert loaded["model"]._metadata == expected["model"]._metadata
    assert loaded["parameter"].requires_grad
    assert loaded["twice"][0] is loaded["twice"][1]
    loaded["twice"][0][12] = -1
    assert loaded["twice"][2][1] == loaded["twice"][3][2, 1] == -1
    assert region.address <= loaded["twice"][0].data_ptr() < region.address + len(region)
    linear.load_state_dict(loaded["model"])
