"""Why a request was refused, and what to do (RFC 9457)."""

from __future__ import annotations

import errno
import re
from typing import Final

import attrs
import msgspec

from aiouffd.errors import PagerError, SessionError, SourceError, UffdError
from aiouffd.kernel.limits import limit_error
from aiouffd.server.clashes import ClashError
from aiouffd.server.control.actions import UnknownSessionError
from aiouffd.server.control.values import MEANT, Problem

__all__ = ["problem_of"]

_PLACE = re.compile(r" - at `(.*)`$")
_FIELD = re.compile(r"(?:unknown|required) field `(.*?)`")


@attrs.frozen
class _Kind:
    errors: type[Exception] | tuple[type[Exception], ...]
    name: str
    title: str
    status: int
    advice: str


_KINDS: Final = (
    _Kind(msgspec.ValidationError, "invalid", "Invalid request", 422, "see /openapi.json for the fields"),
    _Kind((msgspec.DecodeError, UnicodeDecodeError), "malformed", "No JSON", 400, "send a JSON object"),
    _Kind(UnknownSessionError, "no-session", "No such session", 404, "list the sessions"),
    _Kind(SessionError, "session-state", "Not now", 409, "`aiouffd ctl show` tells its state"),
    _Kind(
        SourceError,
        "source",
        "The source fails",
        502,
        "check the path or URL, and whether it may be read",
    ),
    _Kind(PagerError, "pager", "The pager fails", 503, "see the server's log; start the server again if it has ended"),
    _Kind(OSError, "system", "The system refuses", 409, "check the path, and what the server's user may do there"),
    _Kind(UffdError, "failed", "Failed", 500, "see the server's log"),
    _Kind(ValueError, "invalid", "Invalid request", 422, "see /openapi.json for the fields"),
    _Kind(Exception, "bug", "Internal error", 500, "see the server's log, and report it"),
)
"""The first that fits is it."""

_NO_FILES: Final = "raise the server's limit: LimitNOFILE= in its unit, or prlimit(1)"
_ADVICE: Final = {
    errno.EMFILE: _NO_FILES,
    errno.ENFILE: _NO_FILES,
    errno.ENOSPC: "make room on its file system",
    errno.EDQUOT: "make room on its file system, or raise the quota of the server's user",
}
"""By what the system says: more than the kind of the error has to say."""


def problem_of(error: Exception) -> Problem:
    """Return what is answered for an error."""
    kind = next(kind for kind in _KINDS if isinstance(error, kind.errors))
    text = str(error) or repr(error)
    cause = error if isinstance(error, OSError) else error.__cause__  # what could not be written, or read
    number = cause.errno if isinstance(cause, OSError) else None
    if number in _ADVICE:
        kind = attrs.evolve(kind, advice=_ADVICE[number])
    if isinstance(error, OSError) and number in (errno.EMFILE, errno.ENFILE):
        text = str(limit_error("the server", number))
    elif isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    for pattern, words in MEANT.items():
        text = text.replace(f"Expected `str` matching regex {pattern!r}", f"Expected {words}")
    place, name = _PLACE.search(text), _FIELD.search(text)
    if isinstance(error, ClashError):
        return Problem(f"urn:aiouffd:{kind.name}", kind.title, kind.status, text, kind.advice, f"$.{error.one}")
    field = (place[1] if place else "$") + (f".{name[1]}" if name else "") if place or name else ""
    return Problem(f"urn:aiouffd:{kind.name}", kind.title, kind.status, _PLACE.sub("", text), kind.advice, field)
