"""`server.dashboard.looks`: what is told of a session's memory."""

from __future__ import annotations

import os
from typing import Any

import attrs

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.server.dashboard.looks import CELLS, residency

PAGE = 4096


def test_memory_is_told_in_parts() -> None:
    """In order of the source, in per cent, of all clients together; of those that cannot be looked at, nothing."""
    size = 2 * CELLS * PAGE
    with aiouffd.Region(size) as one, aiouffd.Region(size) as other:
        one[: 10 * PAGE] = b"x" * 10 * PAGE
        other[PAGE] = 1
        session: Any = attrs.make_class("Session", ["clients"])({})
        half = size // 2
        for number, (pid, region, offset) in enumerate(
            ((os.getpid(), one, 0), (os.getpid(), other, half), (-1, one, 0))
        ):
            mapping = Mapping(region.address, region.address + half, offset)
            fields: dict[str, Any] = {"end": offset + half, "peer": attrs.make_class("Peer", ["pid"])(pid)}
            fields["tenant"] = attrs.make_class("Tenant", ["mappings"])([mapping])
            session.clients[number] = attrs.make_class("Client", list(fields))(*fields.values())
        found = residency(session)
        assert found.clients == 2
        assert found.cells == [100] * 5 + [0] * (CELLS // 2 - 5) + [50] + [0] * (CELLS // 2 - 1)
        session.clients.clear()
        assert residency(session).cells == [0] * CELLS
