"""`tenancy`: a source is rebuilt from what was packed, or stands for its failure."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import attrs
import pytest

import aiouffd
from aiouffd.engine.assembly import Options, Service
from aiouffd.engine.statistics import Counters
from aiouffd.pager.client.tenant import Pack
from aiouffd.pager.process.tenancy import FailedSource, Tenancy, build

PAGE = 4096


async def test_a_source_is_rebuilt_with_its_options() -> None:
    """Options went through JSON; the bytes are the source's, from a descriptor of its own."""
    data = bytes(range(256)) * 16
    options = Options(readahead=PAGE)
    pack = await asyncio.to_thread(Pack, Service(aiouffd.BufferSource(data)), options)
    record = {**pack.record, "config": pack.fds[0], "fds": pack.fds[1:]}
    origin = await build(Counters(), 5, record)
    assert (origin.identity, origin.options) == (5, options)
    rebuilt: Any = origin.service.origin
    assert bytes(rebuilt.read_nowait(0, PAGE)) == data
    assert all(os.fstat(fd) for fd in record["fds"])  # those in the record stay
    pack.close()


async def test_what_could_not_be_opened_again_fails_page_by_page() -> None:
    """With the reason, at once: it is not tried again."""
    source = FailedSource(FileNotFoundError(2, "No such file", "/x"))
    assert source.retries == 0
    with pytest.raises(aiouffd.SourceError, match="No such file") as caught:
        await source.read(PAGE, PAGE)
    assert (caught.value.offset, caught.value.length) == (PAGE, PAGE)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_the_end_of_a_forked_child_is_not_announced() -> None:
    """The client knows only what it has opened itself."""
    origin: Any = object()
    assert Tenancy(origin, "t").announced
    child = Tenancy(origin, "t", is_child=True)
    assert not child.announced
    assert attrs.evolve(child, is_child=False, announced=True).announced
