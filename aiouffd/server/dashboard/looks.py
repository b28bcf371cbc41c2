"""What the page is told: plain values, a look each second."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import attrs

from aiouffd.kernel import abi
from aiouffd.server.prefilled import PagemapOf
from aiouffd.server.restarts import restarts

if TYPE_CHECKING:
    from aiouffd.server.server import Server
    from aiouffd.server.session import Session

__all__ = ["CELLS", "Look", "Residency", "SessionLook", "residency"]

CELLS: Final = 256
"""Parts of a session's memory, of which each is told how much of it is there."""
_MOST: Final = 1000  # sessions of a look
_TEXT: Final = 300  # characters of a source
_CLIENTS: Final = 16  # of a session, whose memory is looked at
_MAPPINGS: Final = 256  # of a client
_THERE: Final = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED


@attrs.frozen
class SessionLook:
    """What a session has counted until now; `statistics` as in the control's views."""

    name: str
    state: str
    clients: int
    bytes: int
    rejected: int
    source: str
    slow: dict[str, Any]
    statistics: dict[str, int]

    @classmethod
    def of(cls, session: Session) -> SessionLook:
        """Look at a session."""
        length = sum(client.length for client in (*session.clients.values(), *session.mapped))
        counts = (session.served, length, session.rejected)
        return cls(session.name, session.state, *counts, session.source[:_TEXT], session.slow, session.told())


@attrs.frozen
class Look:
    """What a server has counted until now; latency: as `Statistics.latency`, of all sessions together."""

    time: float
    version: str
    pager: list[int]
    rejected: int
    statistics: dict[str, int]
    latency: list[int]
    sessions: list[SessionLook]
    left_out: int
    restarts: list[str]

    @classmethod
    def of(cls, server: Server, version: str) -> Look:
        """Look at a server."""
        sessions = [SessionLook.of(session) for session in islice(server.sessions.values(), _MOST)]
        left_out = len(server.sessions) - len(sessions)
        told = (server.rejected, server.told(), list(server.statistics().latency))
        return cls(time.time(), version, list(server.pids), *told, sessions, left_out, restarts(server))


@attrs.frozen
class Residency:
    """How much of the memory of a session's clients is there.

    Attributes:
        cells: per cent, of equal parts of all that is shown, in order of the offset in the source.
        clients: whose memory was looked at; the others may not be looked at, or are too many.
    """

    cells: list[int]
    clients: int


def residency(session: Session) -> Residency:
    """Look at the memory of a session's clients (PAGEMAP_SCAN, Linux 6.7). Blocks.

    A client whose process has ended, or may not be looked at, is left out.
    """
    clients = list(islice(session.clients.values(), _CLIENTS))
    size = max((client.end for client in clients), default=0)
    step = max(-(-size // CELLS), 1)
    there, shown = [0] * CELLS, [0] * CELLS
    seen = 0
    for client in clients:
        try:
            with PagemapOf(client.peer.pid) as pagemap:
                mappings = list(islice(client.tenant.mappings, _MAPPINGS))
                spans = [
                    (item.start - mapping.start + mapping.offset, item.end - mapping.start + mapping.offset)
                    for mapping in mappings
                    for item in pagemap.scan(mapping.start, mapping.end - mapping.start, anyof=_THERE)
                ]
        except OSError:
            continue
        seen += 1
        for start, end in spans:
            _add(there, step, start, end)
        for mapping in mappings:
            _add(shown, step, mapping.offset, mapping.offset + mapping.end - mapping.start)
    return Residency([100 * one // whole if whole else 0 for one, whole in zip(there, shown, strict=True)], seen)


def _add(cells: list[int], step: int, start: int, end: int) -> None:
    """Add the bytes of [start, end) to the cells that they are in."""
    while start < end:
        cell = start // step
        stop = min(end, (cell + 1) * step)
        cells[cell] += stop - start
        start = stop
