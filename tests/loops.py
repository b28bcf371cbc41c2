"""Runs an async test on asyncio and on uvloop: `@run` on a coroutine function makes it two tests."""

from __future__ import annotations

import asyncio
import functools
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

    @pytest.mark.parametrize("loop", list(LOOPS))
    @functools.wraps(test)
    def plain(*args: Any, loop: str, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(test(*args, **kwargs))

    # pytest looks at the signature of the wrapped function for fixtures: it must see `loop` as well.
    import inspect  # noqa: PLC0415

    signature = inspect.signature(test)
    parameter = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    plain.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), parameter]
    )
    return plain
