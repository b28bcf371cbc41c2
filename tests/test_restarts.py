"""`server.restarts`: what may be restarted."""

from __future__ import annotations

from typing import Any

import attrs

from aiouffd.engine.statistics import Counter, Counters
from aiouffd.server.restarts import restarts


def session(name: str, *, clients: int = 0, poisoned: int = 0, mapped: int = 0, lost: bool = False) -> Any:
    """Return one as far as it is looked at."""
    counters = Counters()
    counters.words[Counter.PAGES_POISONED] = poisoned
    fields = {"name": name, "clients": range(clients), "is_idle": not clients + mapped, "served": clients + mapped}
    fields |= {"counted": counters.words.tolist(), "mapped": attrs.make_class("Mapped", ["have_lost"])(lost)}
    return attrs.make_class("Session", list(fields))(**fields)


def said(sessions: list[Any], *, holds: bool = False) -> list[str]:
    """Return what is said of a server."""
    clients = [client for each in sessions for client in each.clients]
    fields = {"holds": holds, "clients": clients, "sessions": {each.name: each for each in sessions}}
    fields["served"] = sum(each.served for each in sessions)
    return restarts(attrs.make_class("Server", list(fields))(**fields))


def test_what_is_said() -> None:
    """Of the server: whether somebody holds its clients. Of sessions: the broken ones, and the idle ones."""
    assert said([session("")]) == ["This server may be restarted: it serves nobody."]
    found = said([session("", clients=1, poisoned=2), session("b", clients=2), session("c", clients=1, poisoned=1)])
    assert found[0].startswith("This server has 4 clients: if it is restarted, its pager would serve them on alone")
    assert found[1:] == ["Pages are lost, so the clients have to be restarted of (command line), c."]
    many = [session("left", poisoned=1), *(session(f"s{number}") for number in range(11))]
    assert said(many, holds=True) == [
        "This server may be restarted or upgraded: what it serves is held.",
        "Sessions that serve nobody, and may be deleted: left, s0, s1, s2, s3, s4, s5, s6, s7, s8 and 2 more.",
    ]


def test_clients_that_map_files() -> None:
    """They connect again by themselves, to a server at the same socket; a lost page of theirs is lost."""
    waits = "Clients that map files: 2. They wait for a server, and connect to the next one by themselves."
    assert said([session("a", mapped=2)]) == ["This server may be restarted at the same socket.", waits]
    found = said([session("a", mapped=2, lost=True), session("b", clients=1)])
    assert found[0].startswith("This server has 1 client: ")
    assert found[1:] == [waits, "Pages are lost, so the clients have to be restarted of a."]
