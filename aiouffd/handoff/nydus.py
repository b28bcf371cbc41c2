"""nydus' handoff: JSON objects on the same socket, in place of Firecracker's array.

    {"type": 0, "regions": [...], "policy": 0, "enable_prefault": false}    with the userfaultfd
    {"type": 2}                                                            asks for {"type": 3, "size": ...}

The regions are Firecracker's. Their `page_size` is how much an answer brings, and not the size of the memory's pages.
Policy 1 (copy) is served as any other client. With policy 0 (zerocopy) the server answers faults on the connection:
`{"type": 1, "ranges": [...]}`, with a descriptor for each range, which the client maps in place of its memory.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from aiouffd.handoff import firecracker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiouffd.handoff.firecracker import Regions

__all__ = ["MOST_RANGES", "Answers", "Handshake", "Part", "is_object", "is_stat", "ranges", "stated", "taken"]

Answers = Literal["length", "bare"]
"""What precedes an answer: its length (u32, little-endian), or nothing."""

MOST_RANGES: Final = 16
"""Of one answer: clients have room for so many descriptors."""

_HANDSHAKE, _RANGES, _STAT, _STATED = range(4)
_COPY: Final = 1
_VERSION: Final = 1
_MOST: Final = 1 << 40
_BLANKS: Final = b" \t\r\n"
_decoder = json.JSONDecoder()


@attrs.frozen
class Part:
    """Bytes of a source that a file has.

    Attributes:
        offset: where they begin in the source.
        length: bytes, whole pages.
        fd: of the file, open for reading; it stays its owner's.
        place: where they begin in the file.
    """

    offset: int
    length: int
    fd: int
    place: int


@attrs.frozen
class Handshake:
    """What a handshake says.

    Attributes:
        regions: in pages of the machine, and in those of `window` bytes where it may be huge pages: the memory tells.
        window: how much one answer brings, in bytes; a power of two, and at least a page.
        zerocopy: the client maps files. False: its pages are copied.
        prefault: it wants all that it may map at once.
    """

    regions: tuple[Regions, ...]
    window: int
    zerocopy: bool
    prefault: bool

    @classmethod
    def of(cls, message: dict[str, Any]) -> Handshake:
        """Check a message.

        Raises:
            ValueError: what is wrong with it.
        """
        kind, policy = message.get("type", _HANDSHAKE), message.get("policy", 0)
        prefault = message.get("enable_prefault", False)
        if type(kind) is not int or kind != _HANDSHAKE:
            raise ValueError(f"type is {kind!r:.50}, neither a handshake (0) nor a request for the size (2)")
        if type(policy) is not int or policy not in (0, _COPY):
            raise ValueError(f"policy is {policy!r:.50}, neither 0 (zerocopy) nor 1 (copy)")
        if type(prefault) is not bool:
            raise ValueError(f"enable_prefault is {prefault!r:.50}, neither true nor false")
        items = message.get("regions")
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError("regions is no array of objects")
        sizes = [item.get("page_size", mmap.PAGESIZE) for item in items]
        if not sizes or any(type(size) is not int or size != sizes[0] for size in sizes):
            raise ValueError("page_size is not the same number for all of at least one region")
        window = sizes[0]
        if not mmap.PAGESIZE <= window <= _MOST or window & (window - 1):
            raise ValueError(f"page_size is no power of two from {mmap.PAGESIZE} to {_MOST}")
        regions = [_regions(items, mmap.PAGESIZE)]
        if window == firecracker.HUGE:
            with contextlib.suppress(ValueError):  # it has no huge pages then
                regions.append(_regions(items, window))
        return cls(tuple(regions), window, policy != _COPY, prefault)


def _regions(items: list[dict[str, Any]], page_size: int) -> Regions:
    alike = [{**item, "page_size": page_size} for item in items]
    return attrs.evolve(firecracker.checked(alike), extra=None)


def is_object(data: bytes | bytearray) -> bool:
    """Tell whether these bytes begin an object, and not Firecracker's array."""
    return data.lstrip(_BLANKS).startswith(b"{")


def is_stat(message: dict[str, Any]) -> bool:
    """Tell whether a message asks for the size."""
    return type(message.get("type")) is int and message["type"] == _STAT


def taken(data: bytearray) -> dict[str, Any] | None:
    """Take the first object from the front of what has arrived; None: it is not complete.

    Raises:
        ValueError: further bytes cannot make it one.
    """
    text = data.decode(errors="surrogateescape").lstrip()  # a character may be cut
    try:
        message, end = _decoder.raw_decode(text)
        text[:end].encode()
    except json.JSONDecodeError as error:
        if _is_cut(error, text[error.pos :]):
            return None
        raise ValueError(f"not JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error!s:.200}") from None
    if not isinstance(message, dict):
        raise ValueError(f"{text[:50]!r} is no JSON object")  # noqa: TRY004 - no argument has a wrong type
    data[:] = text[end:].encode(errors="surrogateescape")
    return message


def _is_cut(error: json.JSONDecodeError, rest: str) -> bool:
    """Tell whether further bytes behind `rest`, where an error is, may make it right."""
    if not rest or error.msg.startswith("Unterminated string"):
        return True
    if error.msg.startswith("Invalid \\"):
        return len(rest) < len("\\u0000")
    return any(word.startswith(rest) for word in ("true", "false", "null", "-"))


def stated(size: int, answers: Answers) -> bytes:
    """Return the answer to a request for the size, in bytes, of what is served."""
    return _answer(
        {"type": _STATED, "size": size, "block_size": mmap.PAGESIZE, "flags": 0, "version": _VERSION}, answers
    )


def ranges(parts: Sequence[Part], answers: Answers) -> bytes:
    """Return the answer that names these parts, at most `MOST_RANGES`; their descriptors go with it, in this order."""
    found = [{"len": part.length, "blob_offset": part.place, "block_offset": part.offset} for part in parts]
    return _answer({"type": _RANGES, "ranges": found}, answers)


def _answer(message: dict[str, Any], answers: Answers) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode()
    return data if answers == "bare" else len(data).to_bytes(4, "little") + data
