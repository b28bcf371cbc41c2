"""Warnings that are true of all objects of a server: said of the first one, and then counted."""

from __future__ import annotations

import collections
import logging
import re
from typing import Final

__all__ = ["warn"]

log: logging.Logger = logging.getLogger("aiouffd")

_URL: Final = re.compile(r"\w+://[^/']*")
_times: Final[collections.Counter[tuple[str, str]]] = collections.Counter()


def warn(source: object, text: str) -> None:
    """Log that something is true of a source, if it is the first one of its server, or the 10th, the 100th and so on.

    Args:
        source: its `repr` begins the sentence, and has the URL where it has one.
        text: the rest of the sentence.
    """
    name = repr(source)
    found = _URL.search(name)
    place = found[0] if found else type(source).__name__
    _times[place, text] += 1
    times = _times[place, text]
    if times == 1:
        log.warning("%s %s", name, text)
    elif str(times).strip("0") == "1":
        log.warning("%s %s: %d such objects of %s so far", name, text, times, place)
