"""`handoff.nydus`: what is understood, that nothing else is, and what is answered."""

from __future__ import annotations

import contextlib
import json
import mmap
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pattern import PAGE

from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker, nydus
from aiouffd.handoff.firecracker import HUGE

REGION = {"base_host_virt_addr": 16 * HUGE, "size": 4 * HUGE, "offset": 0, "page_size": HUGE, "prot": 1, "flags": 18}
GOOD = {"type": 0, "regions": [REGION], "policy": 0, "enable_prefault": True}


def test_what_nydus_sends() -> None:
    """`page_size` is how much is answered: the memory's pages are those of the machine, or huge."""
    found = nydus.Handshake.of(GOOD)
    assert (found.window, found.zerocopy, found.prefault) == (HUGE, True, True)
    assert [each.page_size for each in found.regions] == [mmap.PAGESIZE, HUGE]
    assert all(each.mappings == (Mapping(16 * HUGE, 20 * HUGE, 0),) and each.extra is None for each in found.regions)
    odd = REGION | {"size": HUGE + PAGE, "aiouffd": {"version": 1}}
    found = nydus.Handshake.of({"regions": [odd], "policy": 1})
    assert [each.page_size for each in found.regions] == [mmap.PAGESIZE]
    assert (found.zerocopy, found.prefault, found.regions[0].extra) == (False, False, None)
    assert nydus.Handshake.of({"regions": [{**odd, "page_size": HUGE << 4}]}).zerocopy
    assert firecracker.claimed(json.dumps(GOOD).encode())[0].length == 4 * HUGE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": 1}, "type is 1"),
        ({"type": False}, "type is False"),
        ({"policy": 2}, "policy is 2"),
        ({"policy": True}, "policy is True"),
        ({"enable_prefault": 1}, "enable_prefault is 1"),
        ({"regions": None}, "no array of objects"),
        ({"regions": [1]}, "no array of objects"),
        ({"regions": []}, "at least one region"),
        ({"regions": [REGION, REGION | {"page_size": PAGE}]}, "not the same number"),
        ({"regions": [REGION | {"page_size": [PAGE]}]}, "not the same number"),
        ({"regions": [REGION | {"page_size": True}]}, "not the same number"),
        ({"regions": [REGION | {"page_size": 3 * PAGE}]}, "no power of two"),
        ({"regions": [REGION | {"page_size": 1 << 100}]}, "no power of two"),
        ({"regions": [REGION | {"size": -PAGE}]}, "not a natural number"),
        ({"regions": [REGION, REGION]}, "overlap"),
        ({"regions": [REGION | {"offset": 10**400}]}, "a number of 1329 bits"),
        ({"policy": "x" * 1000}, "policy is 'x{49}, neither"),
    ],
)
def test_what_is_no_handshake(change: dict[str, Any], reason: str) -> None:
    """The reason says what is wrong."""
    with pytest.raises(ValueError, match=reason):
        nydus.Handshake.of(GOOD | change)


def test_objects_one_behind_the_other() -> None:
    """Each is taken when it is complete, wherever it is cut; what is behind it stays."""
    whole = json.dumps({"type": 2}).encode() + b" \n" + json.dumps(GOOD | {"ü": "{"}, ensure_ascii=False).encode()
    data, found = bytearray(), []
    for byte in whole:
        data.append(byte)
        if data.strip() and (message := nydus.taken(data)) is not None:
            found.append(message)
    assert found == [{"type": 2}, GOOD | {"ü": "{"}]
    assert not data
    assert [nydus.is_stat(message) for message in found] == [True, False]
    assert [nydus.is_object(text) for text in (b" \n{", b"[{}]", b"")] == [True, False, False]
    for wrong in (b'{"a": nothing}', b'{"a"\xff}', b"[{}]", b'{"a":' * 5000):
        with pytest.raises(ValueError, match=r"JSON"):
            nydus.taken(bytearray(wrong))


@given(
    st.dictionaries(
        st.sampled_from([*GOOD, "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False) | st.just(REGION),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*REGION, "x"]), inner),
            max_leaves=6,
        ),
    ),
    st.binary(max_size=40),
)
@example({"policy": 1}, b"")
def test_nothing_is_trusted(message: dict[str, Any], noise: bytes) -> None:
    """What is taken is as it was sent; what is refused is a ValueError."""
    data = bytearray(json.dumps(message).encode() + noise)
    with contextlib.suppress(ValueError):
        assert nydus.taken(data) == message
        assert bytes(data) == noise
    with contextlib.suppress(ValueError):
        nydus.taken(bytearray(noise))
    with contextlib.suppress(ValueError):
        found = nydus.Handshake.of(GOOD | message)
        assert all(0 < each.length <= each.end <= 1 << 57 for each in found.regions)
        assert found.zerocopy == (message.get("policy", 0) == 0)


def test_answers() -> None:
    """With their length before them, or bare."""
    parts = [nydus.Part(3 * PAGE, PAGE, 7, 5 * PAGE), nydus.Part(0, 2 * PAGE, 8, 0)]
    bare = nydus.ranges(parts, "bare")
    assert json.loads(bare) == {
        "type": 1,
        "ranges": [
            {"len": PAGE, "blob_offset": 5 * PAGE, "block_offset": 3 * PAGE},
            {"len": 2 * PAGE, "blob_offset": 0, "block_offset": 0},
        ],
    }
    assert nydus.ranges(parts, "length") == struct.pack("<I", len(bare)) + bare
    largest = nydus.Part(1 << 56, 1 << 56, 9, 1 << 56)
    assert len(nydus.ranges([largest] * nydus.MOST_RANGES, "length")) <= 4096  # what clients have room for
    stated = {"type": 3, "size": 5000, "block_size": mmap.PAGESIZE, "flags": 0, "version": 1}
    assert json.loads(nydus.stated(5000, "bare")) == stated
