"""What may be restarted, of a server as it is now: sentences for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiouffd.engine.statistics import Counter
from aiouffd.report.words import several

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiouffd.server.server import Server

__all__ = ["restarts"]

_NAMED: Final = 10  # sessions in one sentence


def restarts(server: Server) -> list[str]:
    """Return the sentences: of the server first, then of its sessions."""
    clients, mapping = len(server.clients), server.served - len(server.clients)
    if server.holds:
        said = ["This server may be restarted or upgraded: what it serves is held."]
    elif clients:
        rest = "its pager would serve them on alone, since nobody holds them for the next server (--hold)."
        said = [f"This server has {several(clients, 'client')}: if it is restarted, {rest}"]
    elif mapping:
        said = ["This server may be restarted at the same socket."]
    else:
        said = ["This server may be restarted: it serves nobody."]
    if mapping:
        waits = "They wait for a server, and connect to the next one by themselves."
        said.append(f"Clients that map files: {mapping}. {waits}")
    lost, idle = [], []
    for session in server.sessions.values():
        if (session.counted[Counter.PAGES_POISONED] and session.clients) or session.mapped.have_lost:
            lost.append(session.name or "(command line)")
        if session.is_idle and session.name:
            idle.append(session.name)
    if lost:
        said.append(f"Pages are lost, so the clients have to be restarted of {_named(lost)}.")
    if idle:
        said.append(f"Sessions that serve nobody, and may be deleted: {_named(idle)}.")
    return said


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
