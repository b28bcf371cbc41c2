"""Snapshots of the memory of clients that run: what a session asks its pager for, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from time import monotonic
from typing import TYPE_CHECKING

import attrs

from aiouffd.errors import ClosedError, RangeGoneError, SessionError, UffdError
from aiouffd.handoff.receive import enabled_features
from aiouffd.kernel.abi import Feature
from aiouffd.lifetime import until_done

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.pager.client.client import PagerClient
    from aiouffd.server.clients import Client
    from aiouffd.store.live import Captured, Order

__all__ = ["Running", "Snapshots", "require_memory"]

_HOW = "register it with UFFDIO_REGISTER_MODE_WP as well (shared memory: Linux 5.19)"


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
        require_memory(client, self._session)
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
        answer = asyncio.wrap_future(self._pager.request("snapshot", client.tenant, **asked))
        canceled = await until_done(answer, self.cancel)
        if canceled is not None:
            answer.exception()  # nobody else asks for it
            raise canceled
        try:
            return Captured(**answer.result())
        except RangeGoneError as error:
            reason = f"cannot capture {client}: its memory is not protected against writes ({error}): {_HOW}"
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


def require_memory(client: Client, session: str) -> None:
    """Check that the memory of a client can be read and protected.

    Raises:
        SessionError: what is missing, and how the client gives it.
    """
    reason = ""
    if not client.tenant.pack.has_memory:
        reason = "it has given no memory file: send the memfd with the userfaultfd, and map it shared"
    elif client.tenant.page_size > mmap.PAGESIZE:
        reason = "of shared huge pages nobody knows which are in the file: use pages of the base size"
    elif Feature.WP_ASYNC in enabled_features(client.tenant.uffd.fileno()):
        reason = "with UFFD_FEATURE_WP_ASYNC the kernel lets all writes go on: do not enable it"
    if reason:
        raise SessionError(session, f"cannot do this for {client}: {reason}")
