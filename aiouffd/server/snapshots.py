"""Snapshots of the memory of clients that run: what a session asks its pager for, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic
from typing import TYPE_CHECKING

import attrs

from aiouffd.errors import ClosedError, RangeGoneError, SessionError, UffdError
from aiouffd.lifetime import result_of
from aiouffd.server.residence import PROTECTED, lacking

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.pager.client.client import PagerClient
    from aiouffd.server.clients import Client
    from aiouffd.store.live import Captured, Order

__all__ = ["Running", "Snapshots"]


@attrs.frozen
class Running:
    """A snapshot that is being written.

    Attributes:
        client: whose memory it is of.
        order: what is written.
        since: when it was asked for, on the monotonic clock.
    """

    client: Client
    order: Order
    since: float = attrs.field(factory=monotonic)


class Snapshots:
    """Those of the clients of one session, one after the other.

    Args:
        session: its name.
        pager: writes them. It stays the caller's.
        tell: called with what happens, and its details.

    Attributes:
        running: the one that is being written.
    """

    def __init__(self, session: str, pager: PagerClient, tell: Callable[..., None]) -> None:
        self._session = session
        self._pager = pager
        self._tell = tell
        self.running: Running | None = None

    async def take(self, client: Client, order: Order) -> Captured:
        """Write the memory of a client as it is at one moment, while it runs. Canceling is safe: there is none then.

        Args:
            client: has given its memory file.
            order: what is written. Its places and its size are those of the client.

        Raises:
            SessionError: the memory of this client cannot be captured; or another snapshot is being written.
            ClosedError: it was canceled, or the client has ended.
            LayoutChangingError: the client has given pages back (a balloon) that were still to be read.
            StoreError, SourceError: it cannot be written; what is missing cannot be read.
            PagerDiedError: the pager's worker died meanwhile.
        """
        reason = lacking(client.tenant.uffd, client.tenant.page_size, has_file=client.tenant.pack.has_memory)
        if reason:
            raise SessionError(self._session, f"cannot capture {client}: {reason}")
        if self.running is not None:
            raise SessionError(self._session, "has a snapshot under way: wait until it is written, or cancel it")
        order = attrs.evolve(order, places=[(at.start, at.end, at.offset) for at in client.places], size=0)
        self.running = Running(client, order)
        try:
            taken = await self._ask(client, order)
        except BaseException as error:
            reason = str(error) or "who has asked for it has gone"
            self._tell("snapshot.failed", client=client.number, destination=order.destination, reason=reason)
            raise
        finally:
            self.running = None
        self._tell("snapshot.written", client=client.number, destination=order.destination, **attrs.asdict(taken))
        return taken

    async def _ask(self, client: Client, order: Order) -> Captured:
        from aiouffd.store.live import Captured  # noqa: PLC0415 - few sessions take snapshots

        asked = {"order": attrs.asdict(order), "worker": self._pager.pids[1]}
        try:
            taken = await result_of(
                asyncio.wrap_future(self._pager.request("snapshot", client.tenant, **asked)), self.cancel
            )
            return Captured(**taken)
        except RangeGoneError as error:
            reason = f"cannot capture {client}: its memory is not protected against writes ({error}): {PROTECTED}"
            raise SessionError(self._session, reason) from error

    def cancel(self) -> None:
        """Have the snapshot end that is being written; `take` raises when it has.

        Raises:
            SessionError: there is none.
        """
        if self.running is None:
            raise SessionError(self._session, "has no snapshot under way")
        with contextlib.suppress(UffdError):  # its client has ended just now
            self._pager.request("cancel_snapshot", self.running.client.tenant)

    async def progress(self) -> tuple[Running, tuple[int, int] | None]:
        """Return the snapshot that is being written, how many bytes of it are read, and of how many.

        None before its moment. Raises as `cancel`.
        """
        running = self.running
        if running is None:
            raise SessionError(self._session, "has no snapshot under way")
        try:
            return running, await asyncio.wrap_future(self._pager.request("snapshot_progress", running.client.tenant))
        except ClosedError:
            raise SessionError(self._session, "has no snapshot under way any more") from None
