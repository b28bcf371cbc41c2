"""The encoding of CRIU's image files: two magic numbers, then messages of protocol buffers.

Each number is a little-endian u32: one magic for all images, one for the kind of image, then a length before each
message. A message is encoded as protocol buffers are. Few fields are needed, so this module has its own decoder.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING

from aiouffd.errors import HandoffError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["fields", "invalid", "messages", "numbers"]

_COMMON_MAGIC = 0x54564319
_MAX_FILE = 256 << 20
"""An entry of a pagemap has 8 to 24 bytes, so this is enough for ten million entries."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def invalid(path: Path, reason: str) -> HandoffError:
    """Return the error for an image that cannot be used."""
    return HandoffError(str(path), reason)


def messages(path: Path, magic: int) -> Iterator[memoryview]:
    """Read an image and yield its messages.

    Args:
        path: of the image; at most 256 MiB are read.
        magic: of the kind of image that it must be.

    Raises:
        HandoffError: the file cannot be read, is another kind of image, or is truncated.
    """
    data = memoryview(_read(path))
    if len(data) < 8:
        raise invalid(path, f"is no image: it has {len(data)} bytes")
    for place, expected in ((0, _COMMON_MAGIC), (4, magic)):
        (found,) = _U32.unpack_from(data, place)
        if found != expected:
            raise invalid(path, f"is not the expected kind of image: it has {found:#010x}, not {expected:#010x}")
    at = 8
    while at < len(data):
        if len(data) - at < 4:
            raise invalid(path, f"ends at {len(data)} within the length of a message")
        (length,) = _U32.unpack_from(data, at)
        at += 4
        if length > len(data) - at:
            raise invalid(path, f"ends at {len(data)} within a message of {length} bytes at {at}")
        yield data[at : at + length]
        at += length


def fields(path: Path, message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of a message: an int, or the bytes of a field with a length.

    Raises:
        HandoffError: the message is not valid; `path` names the file.
    """
    at = 0
    while at < len(message):
        key, at = _varint(path, message, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise invalid(path, "has a field with the number 0")
        if kind == 0:
            value, at = _varint(path, message, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(path, message, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise invalid(path, f"has a field {number} of the unknown kind {kind}")
        if length > len(message) - at:
            raise invalid(path, f"has a field {number} of {length} bytes, but only {len(message) - at} are left")
        piece = message[at : at + length]
        at += length
        yield number, piece if kind == 2 else (_U64 if kind == 1 else _U32).unpack(piece)[0]


def numbers(path: Path, message: memoryview) -> dict[int, int]:
    """Return the fields that are numbers. The last value of a repeated field counts, as in protocol buffers."""
    return {number: value for number, value in fields(path, message) if isinstance(value, int)}


def _read(path: Path) -> bytes:
    """Return the bytes of a regular file of limited size."""
    try:
        with open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise invalid(path, "is not a regular file")
            if status.st_size > _MAX_FILE:
                raise invalid(path, f"has {status.st_size} bytes; an image has at most {_MAX_FILE}")
            return file.read(_MAX_FILE)
    except OSError as error:
        raise invalid(path, f"cannot be read: {error.strerror}") from error


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a FIFO does not wait for its writer


def _varint(path: Path, message: memoryview, at: int) -> tuple[int, int]:
    """Return (value, position behind it) of the number at `at`."""
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if value >> 64 or shift > 63:
            raise invalid(path, "has a number of more than 64 bits")
        if byte < 0x80:
            return value, at
        shift += 7
    raise invalid(path, "ends within a number")
