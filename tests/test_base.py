"""`sources.base`: the simplest source, and a descriptor that travels."""

from __future__ import annotations

import aiouffd


async def test_zeros() -> None:
    """All of it is a hole."""
    source = aiouffd.ZeroSource(10000)
    assert source.hole(4096, 100) == 100
    assert await source.read(5, 7) == bytes(7)
