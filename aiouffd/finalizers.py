"""Finalizers that do nothing while the interpreter ends."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["until_exit"]

_Object = TypeVar("_Object")


def until_exit(finalizer: Callable[[_Object], None]) -> Callable[[_Object], None]:
    """Have a `__del__` do nothing once the interpreter ends.

    The globals of modules may be None by then, those of the finalizer, too: on a free-threaded Python they are. No
    other thread runs any more, and the kernel frees what the process has.
    """
    system = sys  # no global; its own go last

    @functools.wraps(finalizer)
    def finalize(self: _Object) -> None:
        if not system.is_finalizing():
            finalizer(self)

    return finalize
