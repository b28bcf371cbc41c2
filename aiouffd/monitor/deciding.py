"""Decides with the application's function what becomes of a page that cannot be had."""

from __future__ import annotations

import logging
import sys
import weakref
from typing import TYPE_CHECKING, Literal, TypeAlias

from aiouffd.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.errors import UffdError
    from aiouffd.monitor.engines.protocol import Engine

__all__ = ["Choice", "Deciding"]

log: logging.Logger = logging.getLogger("aiouffd")

Choice: TypeAlias = Literal["sigbus", "retry"]


class Deciding:
    """Is told of each error, and has the engine give up what the application does not want to wait for.

    Args:
        choose: the application's function.
        put: is told of each error as well.
        engine: asks again until it is told otherwise. It keeps this object, and not the other way round.
    """

    def __init__(
        self, choose: Callable[[UffdError], Choice], put: Callable[[BaseException], None], engine: Engine
    ) -> None:
        self._choose = choose
        self._put = put
        self._engine = weakref.ref(engine)

    def __call__(self, error: BaseException) -> None:
        """Put an error, and act on what the application chooses. In the thread that has heard of it."""
        self._put(error)
        engine = self._engine()
        if engine is None or self._chosen(error) == "retry":
            return
        if isinstance(error, SourceError):
            engine.give_up(error.offset, error.length)
        else:  # it names no offset
            engine.give_up(0, sys.maxsize)

    def _chosen(self, error: BaseException) -> Choice:
        try:
            choice = self._choose(error)  # type: ignore[arg-type]  # all that engines report are
            if choice not in ("sigbus", "retry"):
                raise ValueError(f"on_error returned {choice!r:.200}, and neither 'sigbus' nor 'retry'")  # noqa: TRY301
        except Exception:
            log.exception("on_error has not decided: the page is SIGBUS")
            return "sigbus"
        return choice
