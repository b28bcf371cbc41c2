"""Where a snapshot is: the path or the URL of its manifest."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import unquote, urlsplit

from aiouffd.errors import StoreError

__all__ = ["SUFFIX", "absolute", "is_snapshot", "names_with", "split", "without_scheme"]

SUFFIX = ".snap"


def is_snapshot(place: Any) -> bool:
    """Tell whether a path or a URL names the manifest of a snapshot."""
    return isinstance(place, str | os.PathLike) and names_with(place, SUFFIX)


def names_with(place: Any, suffix: str) -> bool:
    """Tell whether a path, or the path of a URL, ends so."""
    text = os.fspath(place)
    return isinstance(text, str) and (urlsplit(text).path if "://" in text else text).endswith(suffix)


def absolute(place: str | os.PathLike[str]) -> str:
    """Return a URL as it is, and a path from the root, with its links."""
    text = os.fspath(place)
    return text if "://" in text else os.path.abspath(text)  # noqa: PTH100 - resolve() would follow links


def without_scheme(place: str) -> str:
    """Return the path that a `file://` URL names; any other place as it is."""
    return unquote(urlsplit(place).path) if place.startswith("file://") else place


def split(place: str | os.PathLike[str]) -> tuple[str, str]:
    """Return (path or URL of the store, name of the manifest in it).

    Raises:
        StoreError: it names no manifest.
    """
    text = without_scheme(os.fspath(place))
    if "://" in text and urlsplit(text).query:
        reason = "a URL with a query, such as a signed one, is of one object; a snapshot has many"
        raise StoreError(urlsplit(text)._replace(query="", netloc="").geturl(), 0, 0, reason)
    above, _, name = text.rpartition("/")
    name = unquote(name) if "://" in text else name
    if not name.endswith(SUFFIX) or name == SUFFIX:
        raise StoreError(text, 0, 0, f"the name of a snapshot ends with {SUFFIX}")
    if "://" not in text:
        above = above or ("/" if text.startswith("/") else ".")
    return above, name
