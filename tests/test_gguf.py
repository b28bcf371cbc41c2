"""GGUF files on a region."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from array_files import DAMAGES, damage, refuses_or_reads, region_of
from hypothesis import given
from hypothesis import strategies as st

import aiouffd
from aiouffd.formats import Gguf
from aiouffd.formats.gguf import BLOCKS

F32, Q8_0, BF16 = 0, 8, 30


def text(value: str) -> bytes:
    """Return a text as the file has it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    """Return a key and its value."""
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    """Return what the file says of a tensor."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(
    pairs: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """Return a file."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs)))) + b"".join(pairs + tensors)
    return head + bytes(-len(head) % 32) + data


VALUES = {
    "general.architecture": (8, text("llama"), "llama"),
    "u8": (0, b"\7", 7),
    "i64": (11, struct.pack("<q", -5), -5),
    "f32": (6, struct.pack("<f", 0.5), 0.5),
    "yes": (7, b"\1", True),
    "numbers": (9, struct.pack("<IQ2i", 5, 2, 3, -4), [3, -4]),
    "tokens": (9, struct.pack("<IQ", 8, 2) + text("a") + text("ü"), ["a", "ü"]),
    "lists": (9, struct.pack("<IQIQB", 9, 1, 0, 1, 9), [[9]]),
}
PLAIN = np.arange(6, dtype=np.float32).reshape(2, 3)
BLOCK = bytes(range(34)) * 4
FILE = gguf(
    [pair(key, kind, value) for key, (kind, value, _) in VALUES.items()],
    [tensor("plain", [3, 2], F32, 0), tensor("blocks", [64, 2], Q8_0, 32), tensor("half", [2], BF16, 168)],
    PLAIN.tobytes() + bytes(8) + BLOCK + b"\x80\x3f\x00\x40",
)


def test_metadata_and_tensors() -> None:
    """Numbers, texts and lists; shapes in C order; quantized ones as raw blocks, on the region."""
    region = region_of(FILE)
    file = Gguf(region)
    assert file.metadata == {key: value for key, (_, _, value) in VALUES.items()}
    assert list(file) == ["plain", "blocks", "half"]
    assert np.array_equal(file["plain"], PLAIN)
    assert (file.info("blocks").kind, file["blocks"].dtype, file["blocks"].shape) == ("Q8_0", np.uint8, (2, 68))
    assert file["blocks"].tobytes() == BLOCK
    assert file["blocks"].ctypes.data == region.address + file.info("blocks").start
    assert (file.info("half").kind, bytes(file.raw("half"))) == ("BF16", b"\x80\x3f\x00\x40")


def test_alignment() -> None:
    """Where the tensors begin is what the file says."""
    data = gguf([pair("general.alignment", 4, struct.pack("<I", 128))], [tensor("a", [1], F32, 0)])
    file = Gguf(region_of(data + bytes(-len(data) % 128) + struct.pack("<f", 2.5)))
    assert file["a"].tolist() == [2.5]


def test_what_the_package_has_written(tmp_path: Any) -> None:
    """The reference writer, and its table of types."""
    package = pytest.importorskip("gguf", reason="the package gguf is not installed")
    table = {kind.name: size for kind, size in package.GGML_QUANT_SIZES.items() if size[0] > 1}
    assert table == BLOCKS
    writer = package.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("tokens", ["a", "b"])
    writer.add_tensor("plain", PLAIN)
    quantized = package.quantize(np.ones((4, 64), np.float32), package.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blocks", quantized, raw_dtype=package.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = Gguf(region_of((tmp_path / "x.gguf").read_bytes()))
    assert file.metadata["tokens"] == ["a", "b"]
    assert np.array_equal(file["plain"], PLAIN)
    assert np.array_equal(file["blocks"], quantized)
    assert file.info("blocks").kind == "Q4_0"


DEEP = pair("deep", 9, struct.pack("<IQ", 9, 1) * 6 + struct.pack("<IQB", 0, 1, 9))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GGU", "the magic"),
        (b"GGML" + FILE[4:], "no GGUF file"),
        (gguf([], [], version=1), "no GGUF file"),
        (b"GGUF" + FILE[7:3:-1] + FILE[8:], "no GGUF file"),
        (gguf([], [], counts=(0, 1 << 63)), "the header ends"),
        (gguf([], [], counts=(1 << 63, 0)), "the header ends"),
        (gguf([struct.pack("<Q", 1 << 62)], []), "65535 are the most"),
        (gguf([pair("a", 8, struct.pack("<Q", 1 << 62))], []), "are the most"),
        (gguf([pair("a", 9, struct.pack("<IQ", 10, 1 << 62))], []), "the header ends"),
        (gguf([pair("a", 9, struct.pack("<IQ", 8, 1 << 62))], []), "the header ends"),
        (gguf([pair("a", 13, b"")], []), "type 13"),
        (gguf([DEEP], []), "at depth 4"),
        (gguf([pair("a", 0, b"1")] * 2, []), "occurs twice"),
        (gguf([pair("general.alignment", 4, bytes(4))], []), "no power of two"),
        (gguf([pair("general.alignment", 8, text("32"))], []), "no power of two"),
        (gguf([], [tensor("a", [1] * 5, F32, 0)], bytes(64)), "5 dimensions"),
        (gguf([], [tensor("a", [1], 4, 0)], bytes(64)), "type 4"),
        (gguf([], [tensor("a", [33], Q8_0, 0)], bytes(64)), "no whole blocks"),
        (gguf([], [tensor("a", [], Q8_0, 0)], bytes(64)), "no whole blocks"),
        (gguf([], [tensor("a", [1 << 63, 2], F32, 0)], bytes(64)), "no memory"),
        (gguf([], [tensor("a", [17], F32, 0)], bytes(64)), "and the file at"),
        (gguf([], [tensor("a", [1], F32, (1 << 64) - 32)], bytes(64)), "and the file at"),
        (gguf([], [tensor("a", [1], F32, 0), tensor("a", [1], F32, 4)], bytes(64)), "occurs twice"),
        (gguf([], [tensor("a", [2], F32, 0), tensor("b", [1], F32, 4)], bytes(64)), "within another"),
    ],
    ids=range(24),
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    """With an error that says why."""
    with pytest.raises(aiouffd.FormatError, match=reason):
        Gguf(region_of(data))


@given(DAMAGES, st.integers(0, 300))
def test_damaged_files(damages: list[tuple[int, bytes]], cut: int) -> None:
    """Are refused or read."""
    refuses_or_reads(Gguf, damage(FILE, damages, cut))


WORDS = st.sampled_from([0, 1, 2, 3, 8, 9, 30, 1 << 32, (1 << 64) - 1])


@given(st.lists(WORDS, max_size=40), st.integers(0, 3), st.integers(0, 3))
def test_any_header(words: list[int], tensors: int, pairs: int) -> None:
    """Of numbers that mean something."""
    data = b"GGUF" + struct.pack(f"<IQQ{len(words)}Q", 3, tensors, pairs, *words)
    refuses_or_reads(Gguf, data + bytes(40))
