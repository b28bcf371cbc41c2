"""`answers`: each operation does what it is asked for, or answers why not."""

from __future__ import annotations

import asyncio
import os
from typing import Any
from unittest.mock import Mock

import pytest
from pairs import running
from pattern import Pattern

import aiouffd
from aiouffd.engine.options import Options, Service
from aiouffd.errors import decode_error
from aiouffd.pager.client.packing import Pack
from aiouffd.pager.process.answers import Answers
from aiouffd.pager.process.serialization import Pickles
from aiouffd.pager.process.state import Meta
from aiouffd.pager.process.tenancy import Arrivals


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("prefetch", {"ranges": [[0, 4096]]}),
        ("refuse", {}),
        ("close", {"poison": True}),
        ("begin", {}),
    ],
)
def test_memory_that_is_not_served(op: str, arguments: dict[str, Any]) -> None:
    """ClosedError, from each operation that needs some."""
    with running() as pager:
        error = decode_error(pager.ask(op, token="nobody's", **arguments)["error"])
        assert isinstance(error, aiouffd.ClosedError)


def test_counters_go_on_where_another_pager_stopped() -> None:
    """They never go down."""
    with running() as pager:
        assert pager.ask("resume", counters=[5, 9], slots=[(1, [3, 4])])["ok"] is None
        assert pager.ask("resume", counters=[7, 2], slots=[(1, [2, 6])])["ok"] is None
        assert list(pager.pair.journal.counters.words[:2]) == [7, 9]
        assert list(pager.pair.journal.counters_of(1).words[:2]) == [3, 6]


def test_a_source_of_ours_is_made_ready_twice() -> None:
    """As often as it is asked for."""
    pack = Pack(Service(aiouffd.ZeroSource(4096)), Options())
    with running() as pager:
        for _ in range(2):
            assert pager.ask("prepare", pack.fds, service=pack.record)["ok"] is None
    pack.close()


def test_what_is_pickled_is_refused_by_a_pager_that_unpickles_nothing() -> None:
    """And its descriptors are closed: none stays in the worker."""
    pack = Pack(Service(Pattern(4096)), Options())
    with running() as pager:
        table = f"/proc/{pager.pair.worker_pid}/fd"
        pager.ask("prepare", pack.fds, service=pack.record)  # the worker has all that it needs by then
        before = len(os.listdir(table))  # noqa: PTH208 - names only
        error = decode_error(pager.ask("prepare", pack.fds, service=pack.record)["error"])
        assert isinstance(error, aiouffd.PagerStartError)
        assert "takes no source or handler" in str(error)
        assert len(os.listdir(table)) == before  # noqa: PTH208 - as above
    pack.close()


async def test_one_source_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where others ask for it, when the first has it already: two would write to one file."""
    monkeypatch.setattr(Answers, "_check_pickles", Mock())
    monkeypatch.setattr(Answers, "_state", Mock())
    opening = most = 0

    async def open_origin(*_: Any) -> Any:
        nonlocal opening, most
        opening += 1
        most = max(most, opening)
        for _turn in range(5):
            await asyncio.sleep(0)
        opening -= 1
        return Mock()

    served = Mock(meta=Meta(owner=0), arrivals=Arrivals(), find=lambda _: None, open_origin=open_origin)
    answers = Answers(served, Mock(), Pickles.ALWAYS)

    def asks(token: str) -> asyncio.Task[Any]:
        message = {"op": "open", "token": token, "own": 0, "service": {"token": "s"}, "counts": []}
        fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]
        return asyncio.create_task(answers.answer(message | {"space": {}}, fds))

    tasks = [asks("a"), asks("a/1")]
    await tasks[0]
    await asyncio.gather(*tasks, asks("a/2"))
    assert most == 1
    assert served.open.call_count == 3
