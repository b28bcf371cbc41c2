"""`handoff.firecracker`: what is understood, and that nothing else is."""

from __future__ import annotations

import json
import mmap
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern import PAGE

from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from aiouffd.ranges import Range

HUGE = 2 << 20
GOOD = {"base_host_virt_addr": 16 * HUGE, "size": 4 * HUGE, "offset": 0, "page_size": PAGE}


def text(*changes: dict[str, Any]) -> bytes:
    """Return an array of regions, each the good one with changes; None takes a key away."""
    items = [{key: value for key, value in (GOOD | change).items() if value is not None} for change in changes]
    return json.dumps(items).encode()


def test_what_firecracker_sends() -> None:
    """Regions of a machine with a gap below 4 GiB, in either order; unknown keys are ignored."""
    found = firecracker.parse(
        text(
            {"base_host_virt_addr": 1 << 40, "offset": 4 * HUGE, "size": HUGE, "page_size_kib": 9, "new": [{}]},
            {},
        )
    )
    assert found.page_size == PAGE
    assert found.extra is None
    assert found.mappings == (
        Mapping(16 * HUGE, 20 * HUGE, 0),
        Mapping(1 << 40, (1 << 40) + HUGE, 4 * HUGE),
    )


def test_the_older_name_of_the_page_size_holds_bytes_too() -> None:
    """Releases up to 1.10 send only that one."""
    found = firecracker.parse(text({"page_size": None, "page_size_kib": HUGE}))
    assert found.page_size == HUGE


@pytest.mark.parametrize(("value", "size"), [(4, PAGE), (16, 4 * PAGE), (2048, HUGE)])
def test_a_client_that_takes_the_older_name_at_its_word(value: int, size: int) -> None:
    """KiB: these numbers are no page sizes in bytes."""
    assert firecracker.parse(text({"page_size": None, "page_size_kib": value})).page_size == size


def test_the_oldest_clients_give_no_page_size() -> None:
    """They know no huge pages: it is the machine's."""
    assert firecracker.parse(text({"page_size": None})).page_size == mmap.PAGESIZE


def test_what_is_encoded_is_parsed() -> None:
    """For our own clients."""
    mappings = [Mapping(0x10000, 0x20000, 0x4000), Mapping(0x30000, 0x31000, 0)]
    found = firecracker.parse(firecracker.encode(mappings, PAGE, {"version": 1}))
    assert (list(found.mappings), found.page_size, found.extra) == (mappings, PAGE, {"version": 1})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "not a JSON array"),
        (b"[]", "not a JSON array"),
        (b"[1]", "not a JSON array"),
        (text(*[{}] * 4097), "more than 4096"),
        (text({"size": None}), "size is None"),
        (text({"size": True}), "size is True"),
        (text({"size": "4096"}), "size is '4096'"),
        (text({"size": 4096.0}), "not a natural number"),
        (text({"offset": -PAGE}), "offset is -4096"),
        (text({"size": 0}), "a region of 0 bytes"),
        (text({"size": 1 << 64}), "a region of 18446744073709551616 bytes"),
        (text({"base_host_virt_addr": (1 << 64) - HUGE}), "a region of"),
        (text({"offset": 1 << 63}), "a region of"),
        (text({"size": PAGE + 1}), "not aligned"),
        (text({"base_host_virt_addr": 5}), "not aligned"),
        (text({"offset": 5}), "not aligned"),
        (text({"page_size": HUGE, "base_host_virt_addr": PAGE}), "not aligned"),
        (text({"page_size": 3000}), "a page size of 3000"),
        (text({"page_size": 0}), "a page size of 0"),
        (text({"page_size": 2048}), "a page size of 2048"),
        (text({"page_size": 1 << 40}), "a page size of"),
        (text({"page_size": 1 << 30, "base_host_virt_addr": 1 << 40, "size": 1 << 30}), "4 KiB to 2 MiB"),
        (text({"page_size": None, "page_size_kib": 0}), "a page size of 0"),
        (text({"page_size": None, "page_size_kib": 3}), "a page size of 3072"),
        (text({"page_size": None, "page_size_kib": "4"}), "page_size_kib is '4'"),
        (text({}, {"page_size": HUGE, "base_host_virt_addr": 1 << 30}), "different page sizes"),
        (text({}, {}), "overlap"),
        (text({}, {"base_host_virt_addr": 19 * HUGE}), "overlap"),
        (text({}, {"base_host_virt_addr": 1 << 30}), "show the same offset 0x0"),
        (text({"aiouffd": 7}), "not an object"),
    ],
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    """Each with its reason."""
    with pytest.raises(ValueError, match=reason.replace("[", r"\[")):
        firecracker.parse(data)


def test_regions_lie_within_the_source() -> None:
    """Its last page may be a part of one."""
    regions = firecracker.parse(text({"size": 2 * PAGE}))
    firecracker.check_size(regions, 2 * PAGE)
    firecracker.check_size(regions, PAGE + 1)
    with pytest.raises(ValueError, match="reaches to offset 0x2000 of a source of 0x1000 bytes"):
        firecracker.check_size(regions, PAGE)


@pytest.mark.parametrize(
    ("data", "ranges"),
    [
        (text({"page_size": 3000, "offset": 5}), [Range(16 * HUGE, 4 * HUGE)]),
        (text({}, {"size": "x"}, {"base_host_virt_addr": 5}, {"size": 1 << 60}), [Range(16 * HUGE, 4 * HUGE)]),
        (text({"size": PAGE + 1}), [Range(16 * HUGE, PAGE)]),
        (b"[1, null, []]", []),
        (b"{}", []),
        (b"5", []),
        (b"[{", []),
    ],
)
def test_addresses_of_a_refused_array(data: bytes, ranges: list[Range]) -> None:
    """What can be understood of it, so that the client does not wait there for ever."""
    assert firecracker.claimed(data) == ranges


_value = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(0, 64).map(lambda n: n * PAGE),
    st.sampled_from([0, 1, PAGE, HUGE, 2**64 - 1, 2**64, 2**63]), st.floats(), st.text(max_size=5), st.lists(st.none()),
)  # fmt: skip
_region = st.dictionaries(st.sampled_from([*GOOD, "page_size_kib", "aiouffd", "x"]), _value)


@settings(max_examples=1_000, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.lists(_region, max_size=6).map(lambda items: json.dumps(items).encode())))
def test_any_bytes(data: bytes) -> None:
    """Either a ValueError, or regions that are aligned, disjoint and within any address space."""
    parse_any(data)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@settings(max_examples=100_000)
@given(st.one_of(st.binary(max_size=200), st.lists(_region, max_size=6).map(lambda items: json.dumps(items).encode())))
def test_any_bytes_for_long(data: bytes) -> None:
    """The same, for long."""
    parse_any(data)


def parse_any(data: bytes) -> None:
    """Parse, and check what is accepted."""
    try:
        found = firecracker.parse(data)
    except ValueError:
        assert all(item.length >= PAGE and item.end <= 1 << 57 for item in firecracker.claimed(data))
        return
    last = 0
    for mapping in found.mappings:
        assert last <= mapping.start < mapping.end <= 1 << 57
        assert mapping.offset >= 0
        assert not any(number % found.page_size for number in attrs_of(mapping))
        last = mapping.end


def attrs_of(mapping: Mapping) -> tuple[int, int, int]:
    """Return its numbers."""
    return mapping.start, mapping.end, mapping.offset
