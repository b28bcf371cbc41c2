"""How what a process holds ends: with its interpreter, in the children that it forks, and when a task is canceled."""

from __future__ import annotations

import contextvars
import functools
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

__all__ = ["Closable", "begun", "close_in_children", "result_of", "uninterrupted", "until_done", "until_exit"]


class Closable(Protocol):
    """What is closed."""

    def close(self) -> None:
        """Close it."""


_AGAIN = 0.05  # seconds

_Object = TypeVar("_Object")
_Result = TypeVar("_Result")
_Held = TypeVar("_Held", bound=Closable)

_held: weakref.WeakSet[Closable] = weakref.WeakSet()


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


def begun(work: Callable[[], _Result]) -> asyncio.Future[_Result]:
    """Have a thread do work that blocks, as `asyncio.to_thread` does; a task would take two more turns of the loop."""
    import asyncio  # noqa: PLC0415 - 20 ms, that a program with a loop has spent already

    only = [work]

    def run() -> _Result:
        return only.pop()()  # the thread has it no more when this goes on: it would keep what ends with it

    return asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, run)


async def uninterrupted(work: Callable[[], _Result], undo: Callable[[], object] | None = None) -> _Result:
    """Have a thread do work that blocks; return its result. Canceling waits for its end, however often it is done.

    Args:
        work: what is done. What it raises is raised, also by what was canceled.
        undo: done as well, and waited for, if this is canceled and the work has not failed.
    """
    import asyncio  # noqa: PLC0415 - as above

    running = begun(work)
    canceled = await until_done(running)
    try:
        result = running.result()
    finally:
        del running  # it has the error, and that this frame: a cycle, which would keep what all frames have
    if canceled is not None:
        if undo is not None:
            await uninterrupted(undo)
        raise asyncio.CancelledError(*canceled)
    return result


async def until_done(
    running: asyncio.Future[_Result], on_cancel: Callable[[], object] = lambda: None
) -> tuple[Any, ...] | None:
    """Wait until a future is done, also if this is canceled, however often; return the CancelledError's arguments then.

    `on_cancel` is called then, and again until it is done: what has not begun yet does not hear that it is to end.

    It is not the error itself: in a variable of one of its own frames that would be a cycle, which keeps all of their
    variables until the next collection. A Monitor has the source, and that the lock of a file.
    """
    import asyncio  # noqa: PLC0415 - as above

    canceled = None
    while not running.done():
        try:
            await asyncio.wait([running], timeout=None if canceled is None else _AGAIN)
        except asyncio.CancelledError as error:
            canceled = error.args
        if canceled is not None and not running.done():
            on_cancel()
    return canceled


async def result_of(running: asyncio.Future[_Result], on_cancel: Callable[[], object]) -> _Result:
    """Return the result of a future. Where this is canceled, it waits as `until_done` does, and the result is dropped.

    The caller has the future in no variable: see `uninterrupted`.
    """
    import asyncio  # noqa: PLC0415 - as above

    canceled = await until_done(running, on_cancel)
    try:
        if canceled is not None:
            running.exception()  # nobody else asks for it
            raise asyncio.CancelledError(*canceled)
        return running.result()
    finally:
        del running


def close_in_children(held: _Held) -> _Held:
    """Have something closed in forked children; return it.

    With a connection they would speak and listen in their parent's name. With a userfaultfd they would keep their
    parent's memory registered after it has closed its own: the kernel gives memory back with the last descriptor.

    This holds for os.fork. A fork that C code makes is not noticed, so a pager checks the sender of each message, too.
    """
    _held.add(held)
    return held


def _close_all() -> None:
    for held in list(_held):
        held.close()


os.register_at_fork(after_in_child=_close_all)
