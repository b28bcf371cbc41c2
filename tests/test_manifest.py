"""`store.manifest`: the JSON that says what a snapshot is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiouffd
from aiouffd.store.manifest import VERSION, Link, Manifest

HASH = "0123456789abcdef" * 4
PLAIN = Manifest(1 << 30, 4096, 65536, "zstd", Link(HASH, 1000))

links = st.builds(Link, st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(1, 4096))
manifests = st.builds(
    Manifest,
    size=st.integers(1, 1 << 48),
    page_size=st.integers(12, 34).map(lambda bits: 1 << bits),
    chunk_size=st.integers(16, 23).map(lambda bits: 1 << bits),
    codec=st.sampled_from(["none", "zstd", "lz4"]),
    index=links,
    base=st.none() | st.just("base.snap"),
    trace=st.none() | links,
    metadata=st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=3),
)


@given(manifests)
def test_what_is_encoded_comes_back(manifest: Manifest) -> None:
    """Equal, and the same bytes each time."""
    data = manifest.encode()
    assert Manifest.decode(data, "x") == manifest
    assert Manifest.decode(data, "x").encode() == data


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": VERSION + 1}, f"its version is {VERSION + 1}; this library reads versions up to {VERSION}"),
        *(({"version": value}, "version") for value in (0, -1, True, "1", None, 1.0)),
        ({"format": "tar"}, "no manifest of a snapshot"),
        *(({"size": value}, "size") for value in (0, -5, 1 << 49, "1", None, 1.5, True)),
        *(({"chunk_size": value}, "chunk_size") for value in (0, 32 << 10, 100_000, 16 << 20, 1 << 80)),
        *(({"page_size": value}, "page_size") for value in (0, 512, 4097)),
        *(({"codec": value}, "codec") for value in ("gzip", None, 1)),
        *(({"base": value}, "base") for value in ("../x.snap", "", ".x", 5, "a/b.snap")),
        *(({"index": value}, "index") for value in (None, "x", {}, {"hash": "../x", "length": 1})),
        *(({"index": {"hash": HASH, "length": value}}, "length") for value in (0, -1, "5", 1 << 60)),
        ({"index": {"hash": HASH.upper(), "length": 5}}, "index"),
        ({"index": {"hash": HASH, "length": 16384 * 200}}, "length"),  # it has 16,384 chunks
        ({"trace": {"hash": HASH, "length": 262144 * 130}}, "length"),  # and 262,144 pages
        ({"trace": {"hash": "x"}}, "trace"),
        ({"metadata": []}, "metadata"),
    ],
)
def test_what_no_manifest_says(change: dict[str, Any], complaint: str) -> None:
    """It is an error that names the object and what is wrong with it."""
    content = {**json.loads(PLAIN.encode()), **change}
    with pytest.raises(aiouffd.StoreError, match=f"s3://b/x.snap: .*{complaint}") as caught:
        Manifest.decode(json.dumps(content).encode(), "s3://b/x.snap")
    assert caught.value.source == "s3://b/x.snap"
    assert caught.value.chunk is None


def test_a_reader_ignores_what_it_does_not_know() -> None:
    """Within a version there may be more than this library knows."""
    content = {**json.loads(PLAIN.encode()), "hint": [1]}
    assert Manifest.decode(json.dumps(content).encode(), "x") == PLAIN


@given(st.binary(max_size=60) | st.sampled_from([b"[" * 100_000, b"5", b"null", b"{}", b'"x"', b"\xff"]))
def test_what_is_no_manifest(data: bytes) -> None:
    """Whatever it is."""
    with pytest.raises(aiouffd.StoreError, match="no manifest of a snapshot"):
        Manifest.decode(data, "x")


@given(st.integers(0, len(PLAIN.encode()) - 1), st.integers(1, 255))
def test_a_damaged_byte(at: int, flip: int) -> None:
    """Nothing but a StoreError, or a manifest that can be."""
    data = bytearray(PLAIN.encode())
    data[at] ^= flip
    try:
        found = Manifest.decode(bytes(data), "x")
    except aiouffd.StoreError:
        return
    assert found.size > 0
    assert found.chunk_size & (found.chunk_size - 1) == 0


@given(st.integers(0, len(PLAIN.encode()) - 3))
def test_a_cut_manifest(length: int) -> None:
    """Each one is noticed."""
    with pytest.raises(aiouffd.StoreError):
        Manifest.decode(PLAIN.encode()[:length], "x")
