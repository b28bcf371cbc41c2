"""How a chunk is compressed, and how it is hashed.

The libraries are of the extra `aiouffd[store]`, and are imported when they are used first.

The hash is BLAKE3, cut to the length that a place needs. A chunk is what its hash says: a writer takes chunks with
equal hashes for equal. An adversary, such as the guest of a microVM, may have made what they hold. So the hash must be
one for which nobody can make two chunks that share it. xxh3 is ten times as fast, but is no such hash. A reader hashes
the frame, which is shorter than its chunk: a tenth of the time that zstd takes for decompression.

A cache belongs to one user, and only damage has to be noticed there: a fingerprint is XXH3, of 128 bits.
"""

from __future__ import annotations

import importlib
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from aiouffd.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "CHECK",
    "CODECS",
    "FINGERPRINT",
    "HASH",
    "LEVEL",
    "checksum",
    "codec_name",
    "compressor",
    "digest",
    "digest_of",
    "expand",
    "fingerprint",
    "prepare",
]

CODECS: Final = {"none": 0, "zstd": 1, "lz4": 2}
"""Name of a codec -> its number in records."""
HASH: Final = 20  # bytes of a chunk's hash: to find two chunks with the same takes 2**80 tries
CHECK: Final = 16  # bytes of a frame's hash: to find another frame with that of a given one takes 2**128 tries
FINGERPRINT: Final = 16  # bytes
LEVEL: Final = 3  # of zstd

_NAMES: Final = {number: name for name, number in CODECS.items()}
_LIBRARIES: Final = {"none": (), "zstd": ("zstandard",), "lz4": ("lz4.block",)}
_UNKNOWN: Final = -1  # a frame of zstd that announces no size
_imported: set[str] = set()  # libraries, as a whole
_contexts = threading.local()  # zstd's are for one thread each


def codec_name(number: int) -> str | None:
    """Return the name of a codec, None if there is no such codec."""
    return _NAMES.get(number)


def digest(data: Any, length: int = HASH) -> bytes:
    """Return the BLAKE3 hash of a buffer."""
    result: bytes = _library("blake3").blake3(data).digest(length)
    return result


def digest_of(parts: Iterable[Any], length: int) -> bytes:
    """Return the BLAKE3 hash of buffers that follow each other."""
    hasher = _library("blake3").blake3()
    for part in parts:
        hasher.update(part)
    result: bytes = hasher.digest(length)
    return result


def fingerprint(data: Any) -> bytes:
    """Return the XXH3 hash of a buffer, which shows damage, not forgery."""
    result: bytes = _library("xxhash").xxh3_128_digest(data)
    return result


def checksum(data: Any) -> bytes:
    """Return the lower half of the XXH64 hash of a buffer, as files of zstd have it: it shows damage, not forgery."""
    whole: int = _library("xxhash").xxh64_intdigest(data)
    return (whole & 0xFFFFFFFF).to_bytes(4, "little")


def prepare(codec: str, hashing: str = "blake3") -> None:
    """Import what decompresses and hashes: 10 ms that the first fault need not wait. Blocks.

    Raises:
        StoreError: a library is missing.
    """
    for library in (hashing, *_LIBRARIES[codec]):
        _library(library)


def compressor(codec: str, level: int = LEVEL) -> Callable[[Any], tuple[int, Any]]:
    """Return a function that gives the codec's number and the frame for a chunk; it may be called by many threads.

    What does not become shorter is not compressed: codec 0.

    Raises:
        ValueError: there is no such codec, or no such level.
        StoreError: its library is missing.
    """
    if codec not in CODECS:
        raise ValueError(f"there is no codec {codec!r}: choose from {', '.join(CODECS)}")
    number = CODECS[codec]
    if codec == "none":
        return lambda data: (0, data)
    if codec == "lz4":
        block = _library("lz4.block")

        def shorten(data: Any) -> bytes:
            result: bytes = block.compress(data, store_size=False)
            return result
    else:
        zstd = _library("zstandard")
        zstd.ZstdCompressor(level=level)  # raises ValueError now, not in a thread

        def shorten(data: Any) -> bytes:
            made: dict[int, Any] = vars(_contexts).setdefault("compressors", {})
            context = made.get(level) or made.setdefault(level, zstd.ZstdCompressor(level=level))
            result: bytes = context.compress(data)
            return result

    def frame(data: Any) -> tuple[int, Any]:
        short = shorten(data)
        return (number, short) if len(short) < len(data) else (0, data)

    return frame


def expand(number: int, frame: Any, size: int) -> Any:
    """Return the chunk of `size` bytes that a frame holds; whether it is the right one, its hash says.

    Raises:
        ValueError: the frame is damaged, or holds another number of bytes.
        StoreError: a library is missing.
    """
    if number == 0:
        data = frame
    elif number == 2:
        block = _library("lz4.block")
        try:
            data = block.decompress(frame, uncompressed_size=size)
        except (block.LZ4BlockError, ValueError) as error:
            raise ValueError(f"lz4 cannot decompress it: {error}") from error
    else:
        data = _zstd(frame, size)
    if len(data) != size:
        raise ValueError(f"it holds {len(data)} bytes, not {size}")
    return data


def _zstd(frame: Any, size: int) -> bytes:
    zstd = _library("zstandard")
    try:
        context = _contexts.decompressor
    except AttributeError:
        context = _contexts.decompressor = zstd.ZstdDecompressor()
    try:
        announced = zstd.frame_content_size(frame)
        if announced not in (size, _UNKNOWN):  # before memory is taken for it
            raise ValueError(f"it announces {announced} bytes, not {size}")
        # max_output_size, read_across_frames, allow_extra_data: by name they take half a microsecond
        data: bytes = context.decompress(frame, size, False, False)
    except zstd.ZstdError as error:
        raise ValueError(f"zstd cannot decompress it: {error}") from error
    return data


def _library(name: str) -> Any:
    # import_module takes 1 us each time. While another thread imports a module, a part of it is in sys.modules.
    found = sys.modules.get(name) if name in _imported else None
    try:
        found = found or importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise StoreError(
            "aiouffd.store", 0, 0, f"needs the library {library}: install it with `pip install 'aiouffd[store]'`"
        ) from error
    _imported.add(name)
    return found
