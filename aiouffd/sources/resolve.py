"""From what a user names to a source."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import unquote, urlsplit

from aiouffd.errors import SourceError
from aiouffd.sources.base import Source
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.object_store import ObjectSource

__all__ = ["as_source"]

_STORES = frozenset(("http", "https", "s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl"))


def as_source(thing: Any, **options: Any) -> Source:
    """Return a source for a path, a URL, a buffer, or a source itself.

    Args:
        thing: a path, `file://`, `http(s)://`, `s3://`, `gs://`, `az://`, anything with the buffer protocol, or a
            source, which is returned as it is.
        **options: for `ObjectSource`.

    Raises:
        SourceError: it names nothing that can be read.
    """
    if isinstance(thing, str) and "://" in thing:
        scheme = urlsplit(thing).scheme
        if scheme == "file":
            return FileSource(unquote(urlsplit(thing).path))
        if scheme not in _STORES:
            raise SourceError(
                thing, 0, 0, f"the scheme {scheme!r} is not known: use a path or one of {sorted(_STORES)}"
            )
        return ObjectSource(thing, **options)
    if isinstance(thing, str | os.PathLike):
        return FileSource(thing)
    if isinstance(thing, Source):
        return thing
    return BufferSource(thing)
