"""Runs an async test on asyncio and on uvloop: `@run` on a coroutine function makes it two tests.

Code of the package that blocks the loop fails them (blockbuster).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from blockbuster import blockbuster_ctx

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


METADATA = ("os.stat", "os.readlink", "os.path.abspath", "os.unlink")
"""What looks at names only, on local files and in /proc: a matter of microseconds, which no thread would shorten."""


async def watched(test: Coroutine[Any, Any, None]) -> None:
    """Run a test that fails when code of the package blocks the loop: a sleep, a file, a blocking socket."""
    with blockbuster_ctx("aiouffd") as watch:
        for name in METADATA:
            watch.functions[name].deactivate()
        await test


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make two plain tests of an async one."""

    @functools.wraps(test)
    def plain(*args: Any, loop: str, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(watched(test(*args, **kwargs)))

    # pytest looks at the signature for fixtures, and wraps() has given it the test's: `loop` must be in it as well.
    signature = inspect.signature(test)
    parameter = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    vars(plain)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), parameter])
    marked: Callable[..., None] = pytest.mark.parametrize("loop", list(LOOPS))(plain)
    return marked
