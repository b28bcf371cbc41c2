"""The manifest of a snapshot: the JSON object that says what it is, and names its index."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import attrs

from aiouffd.errors import StoreError
from aiouffd.store.codecs import CODECS

__all__ = ["LARGEST_CHUNK", "LARGEST_MANIFEST", "SMALLEST_CHUNK", "VERSION", "Link", "Manifest", "checked_chunk_size"]

VERSION: Final = 1
SMALLEST_CHUNK: Final = 64 << 10
LARGEST_CHUNK: Final = 8 << 20  # the length of a frame has 24 bits
LARGEST_MANIFEST: Final = 1 << 20
_LARGEST_IMAGE: Final = 1 << 48
_FEW: Final = 4096
_PER_CHUNK: Final = 128  # bytes of an index, at most: a record, the name of a pack for itself, and of a group
_PER_PAGE: Final = 128  # bytes of a recording, at most: each page sixteen times
_FORMAT: Final = "aiouffd snapshot"
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"(?!\.)[^/\0]{1,255}")


@attrs.frozen
class Link:
    """Names another object of the store by its content.

    Attributes:
        hash: the BLAKE3 hash of the object, 64 hexadecimal digits.
        length: its bytes.
    """

    hash: str
    length: int


@attrs.frozen
class Manifest:
    """What a snapshot is.

    Attributes:
        size: bytes of the image.
        page_size: of the memory that it is an image of, in bytes.
        chunk_size: bytes of the image in one chunk.
        codec: the name of the codec that this layer was written with.
        index: the index.
        base: the name of the manifest that this layer was written upon; None: there was none. For people only.
        trace: the recording of first touches; None: there is none.
        metadata: what its writer has to say, any JSON.
    """

    size: int
    page_size: int
    chunk_size: int
    codec: str
    index: Link
    base: str | None = None
    trace: Link | None = None
    metadata: dict[str, Any] = attrs.field(factory=dict)

    def encode(self) -> bytes:
        """Return the JSON text; the same manifest gives the same bytes."""
        content: dict[str, Any] = {"format": _FORMAT, "version": VERSION}
        for name, value in attrs.asdict(self, recurse=False).items():
            content[name] = attrs.asdict(value) if isinstance(value, Link) else value
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, name: str) -> Manifest:
        """Parse a manifest; name: of the object, for errors.

        Raises:
            StoreError: it is none, or is of a version that is not known, or says what cannot be.
        """
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise StoreError(name, 0, 0, f"it is no manifest of a snapshot: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise StoreError(name, 0, 0, "it is no manifest of a snapshot")
        version = content.get("version")
        if type(version) is not int or version < 1:
            raise StoreError(name, 0, 0, f"its version {version!r:.40} is no number from 1 on")
        if version > VERSION:
            raise StoreError(
                name, 0, 0, f"its version is {version}; this library reads versions up to {VERSION}: use a newer one"
            )
        try:
            return cls._checked(content)
        except ValueError as error:
            raise StoreError(name, 0, 0, f"its manifest is damaged: {error}") from error

    @classmethod
    def _checked(cls, content: dict[str, Any]) -> Manifest:
        codec, base, metadata = content.get("codec"), content.get("base"), content.get("metadata", {})
        if codec not in CODECS:
            raise ValueError(f"codec {codec!r:.40}")
        if base is not None and not (isinstance(base, str) and _NAME.fullmatch(base)):
            raise ValueError(f"base {base!r:.40}")
        if not isinstance(metadata, dict):
            raise ValueError("metadata")  # noqa: TRY004 - of a file, not of a call
        size, chunk_size = _whole(content, "size", 1, _LARGEST_IMAGE), checked_chunk_size(content.get("chunk_size"))
        chunks, pages = -(-size // chunk_size), -(-size // (1 << 12))
        return cls(
            size,
            _power_of_two(content, "page_size", 1 << 12, 1 << 34),
            chunk_size,
            codec,
            _link(content.get("index"), "index", _FEW + chunks * _PER_CHUNK),
            base,
            None if content.get("trace") is None else _link(content["trace"], "trace", _FEW + pages * _PER_PAGE),
            metadata,
        )


def checked_chunk_size(value: Any) -> int:
    """Return the value if it can be the size of a chunk; raise ValueError if not."""
    return _power_of_two({"chunk_size": value}, "chunk_size", SMALLEST_CHUNK, LARGEST_CHUNK)


def _whole(content: dict[str, Any], name: str, least: int, most: int) -> int:
    value = content.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} {value!r:.40} is no whole number from {least} to {most}")
    return value


def _power_of_two(content: dict[str, Any], name: str, least: int, most: int) -> int:
    value = _whole(content, name, least, most)
    if value & (value - 1):
        raise ValueError(f"{name} {value} is no power of two")
    return value


def _link(value: Any, name: str, most: int) -> Link:
    if not isinstance(value, dict) or not isinstance(value.get("hash"), str) or not _HASH.fullmatch(value["hash"]):
        raise ValueError(f"{name} names no hash")
    return Link(value["hash"], _whole(value, "length", 1, most))
