"""Runs an async test on asyncio and on uvloop: `@run` on a coroutine function makes it two tests."""

from __future__ import annotations

import asyncio
import functools
import inspect
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make two plain tests of an async one."""

    @functools.wraps(test)
    def plain(*args: Any, loop: str, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(test(*args, **kwargs))

    # pytest looks at the signature for fixtures, and wraps() has given it the test's: `loop` must be in it as well.
    signature = inspect.signature(test)
    parameter = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    vars(plain)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), parameter])
    marked: Callable[..., None] = pytest.mark.parametrize("loop", list(LOOPS))(plain)
    return marked
