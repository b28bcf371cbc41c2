"""Finds the source for what a user names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from aiouffd.errors import SourceError
from aiouffd.sources.base import Source
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from aiouffd.store.place import is_snapshot, names_with, without_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiouffd.store.cache import ChunkCache

__all__ = ["as_layers", "as_source"]

_COMPRESSED = ".zst"
_STORES = frozenset(("http", "https", "s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl"))


def as_source(
    thing: Any,
    *,
    timeout: float | None = None,
    retries: int | None = None,
    options: Mapping[str, Any] | None = None,
    cache: ChunkCache | None = None,
    writable: bool = False,
) -> Source:
    """Return a source for a path, a URL, a buffer, or a source itself.

    Blocks on the file system for a path; does not ask the server of a URL, and does not open a snapshot yet.

    Args:
        thing: a path, `file://`, `http(s)://`, `s3://`, `gs://`, `az://`, another URL that fsspec knows, an object with
            the buffer protocol, or a source, which is returned as it is. A path or URL that ends with `.snap` names a
            snapshot. One that ends with `.zst` names a file in zstd's seekable format, and its source is of the bytes
            that this holds.
        timeout: of an `ObjectSource` or a `SnapshotSource`.
        retries: as `timeout`.
        options: for the store of such a source.
        cache: keeps the chunks of such a source. What is a local file, a buffer or a source is read as it is.
        writable: a path is to take back what is written; nothing else is changed by that.

    Raises:
        BusyError: another has the file for writing.
        SourceError: it names nothing that can be read.
        PermissionError: the cache's folder is another user's, or others may enter it.
        TypeError: it is none of these, or `cache` is something else.
    """
    if cache is not None and not hasattr(cache, "check"):
        raise TypeError(f"cache= takes a ChunkCache(path, max_bytes=...), not {cache!r:.80}")
    if isinstance(thing, str):
        thing = without_scheme(thing)
    if is_snapshot(thing):
        from aiouffd.store.snapshot_source import SnapshotSource  # noqa: PLC0415 - most programs do without

        return _cached(SnapshotSource(thing, timeout=timeout, retries=retries, **(options or {})), cache)
    if isinstance(thing, str) and "://" in thing:
        return _cached(_decompressed(thing, _of_url(thing, timeout, retries, options or {})), cache)
    if isinstance(thing, str | os.PathLike):
        return _decompressed(thing, FileSource(thing, writable=writable and not names_with(thing, _COMPRESSED)))
    if isinstance(thing, Source) and not isinstance(thing, type):
        return thing
    try:
        view = memoryview(thing)
    except TypeError as error:
        raise TypeError(f"{thing!r:.200} is no path, no URL, no buffer and no Source") from error
    return BufferSource(view)


def as_layers(names: Sequence[str], **options: Any) -> Source:
    """Return the source of a path or URL, and of the sparse files over it, the lowest first; errors as for `as_source`.

    Args:
        names: the base, and the files.
        **options: of `as_source`, for the base.
    """
    base = as_source(names[0], **options)
    if len(names) == 1:
        return base
    from aiouffd.sources.layered import LayeredSource  # noqa: PLC0415 - as above

    return LayeredSource([base, *names[1:]])


def _of_url(url: str, timeout: float | None, retries: int | None, options: Mapping[str, Any]) -> Source:
    from urllib.parse import urlsplit  # noqa: PLC0415 - 2 ms, that those with paths need not spend

    scheme = urlsplit(url).scheme
    if scheme not in _STORES or "::" in url:
        return _by_fsspec(url, scheme, options)
    from aiouffd.sources.object_store import ObjectSource  # noqa: PLC0415 - http.client and more: 20 ms

    return ObjectSource(url, timeout=timeout, retries=retries, **options)


def _by_fsspec(url: str, scheme: str, options: Mapping[str, Any]) -> Source:
    """Return a source for a URL that only fsspec may know."""
    try:
        from fsspec import available_protocols  # noqa: PLC0415 - an extra
    except ImportError:
        known, others = False, "what fsspec knows, which is not installed: pip install 'aiouffd[fsspec]'"
    else:
        known, others = scheme in available_protocols(), "what fsspec knows"
    if not known:
        reason = f"the scheme {scheme!r} is unknown: use a path, one of {sorted(_STORES)}, or {others}"
        raise SourceError(url, 0, 0, reason)
    from aiouffd.sources.fsspec_source import FsspecSource  # noqa: PLC0415 - as above

    return FsspecSource(url, **options)


def _decompressed(place: str | os.PathLike[str], source: Source) -> Source:
    """Return the source of what a file holds, if its name says that it is compressed."""
    if not names_with(place, _COMPRESSED):
        return source
    from aiouffd.store.zstd_seekable import ZstdSeekableSource  # noqa: PLC0415 - as above

    return ZstdSeekableSource(source)


def _cached(source: Source, cache: ChunkCache | None) -> Source:
    if cache is None or isinstance(getattr(source, "compressed", source), FileSource):
        return source
    from aiouffd.store.cached_source import CachedSource  # noqa: PLC0415 - as above

    cache.check()
    return CachedSource(source, cache)
