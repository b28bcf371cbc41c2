"""What a server does while another is about to take over: it takes no client, answers none, and changes no session."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING

from aiouffd.errors import SessionError, UffdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from aiouffd.pager.client.client import PagerClient
    from aiouffd.server.session import Session

__all__ = ["Yielding", "YieldsError"]

_NOTED = 5.0  # seconds for the pager to note what it was told; one that does not answer is about to be ended


class YieldsError(SessionError):
    """A session is not changed now, since another server is about to take over. Where that fails, it can be."""


class Yielding:
    """Of one server. What has begun is done before anything is the other's. Used on the server's loop.

    Args:
        sessions: the server's, by name.
        pager: its pager.

    Attributes:
        is_under_way: another server is about to take over.
    """

    def __init__(self, sessions: Mapping[str, Session], pager: PagerClient) -> None:
        self._sessions = sessions
        self._pager = pager
        self._changes = 0  # under way
        self._changed = asyncio.Event()
        self._turn: asyncio.Task[None] | None = None
        self.is_under_way: bool = False

    def begin(self, number: str) -> None:
        """Another server has come, the holder's guest of this number: tell the holder when all is its own."""
        self.is_under_way = True
        self._turn = asyncio.get_running_loop().create_task(self._behind(self._turn, partial(self._yield, number)))

    def end(self) -> None:
        """It has failed: go on."""
        self.is_under_way = False
        self._turn = asyncio.get_running_loop().create_task(self._behind(self._turn, self._go_on))

    @contextlib.contextmanager
    def change(self, name: str) -> Iterator[None]:
        """Change which sessions take clients in this block: nobody takes over in the middle of it.

        Raises:
            YieldsError: another server is about to.
        """
        if self.is_under_way:
            raise YieldsError(name, "is not created, drained or deleted now: another server takes over")
        self._changes += 1
        try:
            yield
        finally:
            self._changes -= 1
            self._changed.set()

    async def _behind(self, before: asyncio.Task[None] | None, do: Callable[[], Awaitable[None]]) -> None:
        """End what was begun before this, and do this."""
        if before is not None:
            before.cancel()
            await asyncio.wait([before])
        await do()

    async def _yield(self, number: str) -> None:
        await self._pause()
        if self._changes:
            while self._changes:
                self._changed.clear()
                await self._changed.wait()
            await self._pause()  # those that were made meanwhile
        with contextlib.suppress(UffdError, TimeoutError):
            async with asyncio.timeout(_NOTED):
                await asyncio.wrap_future(self._pager.ping())
        self._pager.holding.yielded(number)

    async def _pause(self) -> None:
        await asyncio.gather(*(session.pause() for session in self._sessions.values()))

    async def _go_on(self) -> None:
        await asyncio.gather(*(session.go_on() for session in self._sessions.values()))
