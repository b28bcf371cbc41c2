"""Firecracker's handoff: a JSON array of regions, sent together with the userfaultfd.

    [{"base_host_virt_addr": ..., "size": ..., "offset": ..., "page_size": ...}, ...]

The array has neither a length nor a terminator: it is complete when it parses. Unknown keys are ignored. `aiouffd` in
the first element is from our own clients, who want answers (see `json_lines`) and send a pipe as a further descriptor.

Clients give the page size in three ways. `page_size` is bytes. `page_size_kib` is the older name, and holds bytes in
spite of it; some clients take it at its word, and send 4 to 2048. The oldest clients know no huge pages, and send
neither.
"""

from __future__ import annotations

import itertools
import json
import mmap
from typing import Any, Final

import attrs

from aiouffd.engine.mappings import Mapping
from aiouffd.ranges import Range, align_up

__all__ = ["HUGE", "MAX_REGIONS", "Regions", "check_size", "checked", "claimed", "encode", "is_whole", "parse"]

HUGE: Final = 2 << 20
MAX_REGIONS: Final = 4096
_MAX_ADDRESS: Final = 1 << 57  # what a process can map at most, on any 64-bit architecture of today
_PAGE_BITS: Final = range(12, 22)  # 4 KiB to 2 MiB: one COPY of 1 GiB would stop the other clients for seconds
_MAX_KIB: Final = 2048


@attrs.frozen
class Regions:
    """What the array says.

    Attributes:
        mappings: addresses of the peer, and the offsets of its source that they show, both disjoint; by address.
        page_size: bytes, the same for all.
        extra: what one of our own clients asks for; None for others.
    """

    mappings: tuple[Mapping, ...]
    page_size: int
    extra: dict[str, Any] | None

    @property
    def length(self) -> int:
        """Bytes of all mappings together."""
        return sum(mapping.end - mapping.start for mapping in self.mappings)

    @property
    def end(self) -> int:
        """The offset behind the last byte that is shown."""
        return max(mapping.offset + mapping.end - mapping.start for mapping in self.mappings)


def encode(mappings: list[Mapping], page_size: int, extra: dict[str, Any] | None = None) -> bytes:
    """Return the message for these mappings."""
    items: list[dict[str, Any]] = [
        {
            "base_host_virt_addr": mapping.start,
            "size": mapping.end - mapping.start,
            "offset": mapping.offset,
            "page_size": page_size,
        }
        for mapping in mappings
    ]
    if extra is not None:
        items[0]["aiouffd"] = extra
    return json.dumps(items).encode()


def parse(data: bytes | bytearray) -> Regions:
    """Check the array.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        items = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ValueError("not a JSON array of at least one region")
    return checked(items)


def checked(items: list[dict[str, Any]]) -> Regions:
    """Check regions that are JSON, at least one.

    Raises:
        ValueError: what is wrong with them.
    """
    if len(items) > MAX_REGIONS:
        raise ValueError(f"{len(items)} regions, more than {MAX_REGIONS}")
    sizes = {_page_size(item) for item in items}
    if len(sizes) > 1:
        raise ValueError(f"regions of {len(sizes)} different page sizes")
    page = sizes.pop()
    if page & (page - 1) or page.bit_length() - 1 not in _PAGE_BITS:
        raise ValueError(f"a page size of {page} bytes; page sizes of 4 KiB to 2 MiB are supported")
    mappings = sorted((_mapping(item, page) for item in items), key=lambda mapping: mapping.start)
    for before, after in itertools.pairwise(mappings):
        if before.end > after.start:
            raise ValueError(f"regions overlap at {after.start:#x}")
    # What is present is known by offset, so that a page shown at two addresses would be brought to one of them only.
    for before, after in itertools.pairwise(sorted(mappings, key=lambda mapping: mapping.offset)):
        if before.offset + before.end - before.start > after.offset:
            raise ValueError(
                f"regions at {before.start:#x} and {after.start:#x} show the same offset {after.offset:#x}"
            )
    extra = items[0].get("aiouffd")
    if extra is not None and not isinstance(extra, dict):
        raise ValueError("the value of `aiouffd` is not an object")
    return Regions(tuple(mappings), page, extra)


def _page_size(item: dict[str, Any]) -> int:
    if "page_size" in item:
        return _number(item, "page_size")
    if "page_size_kib" not in item:
        return mmap.PAGESIZE
    value = _number(item, "page_size_kib")
    return value << 10 if value <= _MAX_KIB else value


def _number(item: dict[str, Any], key: str) -> int:
    value = item.get(key)
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} is {value!r:.50}, not a natural number")
    if value >> 100:  # would fill the log
        raise ValueError(f"{key} is a number of {value.bit_length()} bits")
    return value


def _mapping(item: dict[str, Any], page: int) -> Mapping:
    start, size, offset = (_number(item, key) for key in ("base_host_virt_addr", "size", "offset"))
    if not size or start + size > _MAX_ADDRESS or offset + size > _MAX_ADDRESS:
        raise ValueError(f"a region of {size} bytes at {start:#x} from offset {offset:#x}")
    if start % page or size % page or offset % page:
        raise ValueError(f"a region at {start:#x}, {size:#x} bytes, offset {offset:#x}, not aligned to {page} bytes")
    return Mapping(start, start + size, offset)


def check_size(regions: Regions, size: int, unit: int = 0) -> None:
    """Check that all offsets lie in a source of `size` bytes. Its last page may be a part of one: the rest is zeros.

    Args:
        regions: of a client.
        size: of the source.
        unit: in place of a page, if it is larger.

    Raises:
        ValueError: a region reaches further.
    """
    if regions.end > align_up(size, max(unit, regions.page_size)):
        raise ValueError(f"a region reaches to offset {regions.end:#x} of a source of {size:#x} bytes")


def claimed(data: bytes | bytearray) -> list[Range]:
    """Return the addresses that a refused array names, as far as they can be understood, in whole pages."""
    try:
        items = json.loads(data)
    except (ValueError, RecursionError):
        return []
    if isinstance(items, dict):  # nydus' handshake
        items = items.get("regions")
    found = []
    for item in items[:MAX_REGIONS] if isinstance(items, list) else ():
        try:
            start, size = _number(item, "base_host_virt_addr"), _number(item, "size")
        except (ValueError, AttributeError):
            continue
        if mmap.PAGESIZE <= size <= _MAX_ADDRESS - start and start % mmap.PAGESIZE == 0:
            found.append(Range(start, size & -mmap.PAGESIZE))
    return found


def is_whole(data: bytes | bytearray) -> bool:
    """Tell whether further bytes cannot make this an array: it is JSON, or cannot become JSON."""
    try:
        json.loads(data)
    except json.JSONDecodeError as error:
        return error.pos < len(data) and not error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return True
    return True
