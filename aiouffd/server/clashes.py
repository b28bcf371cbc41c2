"""What excludes each other in a session: said here once, for the command line, the control and a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

__all__ = ["CHOSEN", "MAPPING", "ClashError", "check", "why_not"]

CHOSEN: Final = "a source for each client"
MAPPING: Final = "a client that maps files"

_NOT_COUNTED: Final = "clients are limited here, and what is mapped is not counted"
_CLASHES: Final = (
    ("record", "replay", "a recording does not see pages that a replay brings"),
    ("record", "max_resident", "a recording is of what comes once, and what is dropped comes again"),
    ("one_copy", "max_resident", "the file that all clients map is not dropped"),
    ("one_copy", CHOSEN, "all clients map one file, which has one source"),
    (MAPPING, "record", "touches are recorded here, and those of what is mapped are not seen"),
    (MAPPING, "max_resident", _NOT_COUNTED),
    (MAPPING, "client_events", _NOT_COUNTED),
    (MAPPING, "client_bytes", _NOT_COUNTED),
)


class ClashError(ValueError):
    """Two things exclude each other.

    Attributes:
        one: what is to be left out.
        other: or this.
        why: they exclude each other.
    """

    def __init__(self, one: str, other: str, why: str) -> None:
        super().__init__(one, other, why)
        self.one: str = one
        self.other: str = other
        self.why: str = why

    def __str__(self) -> str:
        return self.said(str)

    def said(self, named: Callable[[str], str]) -> str:
        """Return the sentence, with the names that these things have elsewhere."""
        return f"give either {named(self.one)} or {named(self.other)}: {self.why}"


def check(given: Collection[str]) -> None:
    """Refuse what excludes each other: names of `Settings`, of its options and limits, or those above.

    Raises:
        ClashError: the first that does.
    """
    for one, other, why in _CLASHES:
        if one in given and other in given:
            raise ClashError(one, other, why)


def why_not(given: Collection[str], more: str) -> str:
    """Return why one more cannot be there beside others; "": it can."""
    return next((why for one, other, why in _CLASHES if more in (one, other) and {one, other} <= {*given, more}), "")
