"""One answer to a request for bytes of an object, and what must stay the same between two of them."""

from __future__ import annotations

import datetime as dt
import email.utils
from typing import Any, NamedTuple

__all__ = ["Answer", "Validator", "seconds_of", "time_of"]


class Validator(NamedTuple):
    """What a server says about the version of an object.

    Attributes:
        size: of the object in bytes, None if the server does not say.
        tag: its ETag.
        modified: its Last-Modified.
    """

    size: int | None
    tag: str | None = None
    modified: dt.datetime | None = None

    @classmethod
    def of_plain(cls, size: int | None, tag: str | None, modified: float | None) -> Validator:
        """Return what `plain` was called for."""
        return cls(size, tag, None if modified is None else dt.datetime.fromtimestamp(modified, dt.UTC))

    def plain(self) -> tuple[int | None, str | None, float | None]:
        """Return the same as values that JSON has: the time in seconds since 1970."""
        return self.size, self.tag, None if self.modified is None else self.modified.timestamp()

    @property
    def strong_tag(self) -> str | None:
        """The ETag, if it promises the same bytes. A weak one promises the same meaning; If-Match never matches it."""
        return self.tag if self.tag is not None and not self.tag.startswith("W/") else None

    def conditions(self) -> dict[str, str]:
        """Return the headers by which a server refuses to answer with another version."""
        if self.strong_tag is not None:
            return {"If-Match": self.strong_tag}
        if self.modified is not None:
            return {"If-Unmodified-Since": email.utils.format_datetime(self.modified, usegmt=True)}
        return {}

    @property
    def names_version(self) -> bool:
        """Whether another version of the same size would be noticed."""
        return self.tag is not None or self.modified is not None

    def contradicts(self, other: Validator) -> bool:
        """Tell whether two answers are of different versions, as far as both say something."""
        if self.size is not None and other.size is not None and self.size != other.size:
            return True
        if self.tag is not None and other.tag is not None and self.tag != other.tag:
            return True
        if self.strong_tag is not None and self.strong_tag == other.strong_tag:
            return False  # the copies of one version may have different times
        return self.modified is not None and other.modified is not None and self.modified != other.modified


class Answer(NamedTuple):
    """Bytes of an object.

    Attributes:
        data: a buffer.
        start: offset of its first byte in the object.
        validator: of the version that they are of.
    """

    data: Any
    start: int
    validator: Validator


def time_of(last_modified: str | None) -> dt.datetime | None:
    """Return the time of a Last-Modified. One without a time zone is UTC, as all are meant to be.

    Raises:
        ValueError, OverflowError: it is no time.
    """
    if last_modified is None:
        return None
    time = email.utils.parsedate_to_datetime(last_modified)
    return time.replace(tzinfo=dt.UTC) if time.tzinfo is None else time.astimezone(dt.UTC)


def seconds_of(retry_after: str | None) -> float:
    """Return for how long a server wants to be left alone: a Retry-After has seconds, or a time. 0: it does not say."""
    text = (retry_after or "").strip()
    try:
        if text.isdecimal():
            return float(text)
        time = time_of(text or None)
        return 0.0 if time is None else max(0.0, (time - dt.datetime.now(dt.UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0
