"""Workers whose keeper is dead: they serve on, until others have taken over from them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.mappings import Mapping

if TYPE_CHECKING:
    import socket

    from aiouffd.pager.client.tenant import Tenant
    from aiouffd.pager.process.journal import Journal

__all__ = ["Orphan", "kill", "mappings_of"]


@attrs.frozen
class Orphan:
    """A worker without a keeper.

    Attributes:
        connection: to it.
        journal: its own.
        worker: its pidfd; -1 where it never was ready.
    """

    connection: socket.socket
    journal: Journal
    worker: int

    @property
    def lives(self) -> bool:
        """Whether it serves on."""
        poller = select.poll()
        if self.worker < 0:
            return False
        poller.register(self.worker, select.POLLIN)
        return not poller.poll(0)

    def close(self) -> None:
        """Be done with it."""
        self.connection.close()
        if self.worker >= 0:
            os.close(self.worker)


def kill(pidfd: int) -> None:
    """Kill a process with -9, if it lives."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def mappings_of(state: dict[str, Any] | None, tenant: Tenant) -> list[Mapping]:
    """Return what a tenant shows now, from the state of a pager that is gone."""
    for item in state["spaces"] if state is not None else ():
        if item["token"] == tenant.token and not item["child"]:
            return [Mapping(*each) for each in item["mappings"]]
    return tenant.mappings
