"""`pager.process.common_files`: no space is read before all have come that map its file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from aiouffd.engine.mappings import ZEROS, Mapping, Mappings
from aiouffd.pager.process.common_files import CommonFiles
from aiouffd.pager.process.state import Meta, SpaceState


class Reads:
    """A dispatcher: notes who is held."""

    def __init__(self) -> None:
        self.spaces: list[Any] = []

    def hold(self, space: Any, _: str) -> None:
        """Read it no more."""
        self.spaces.append(space)

    def release(self, space: Any, _: str) -> None:
        """Read it again."""
        self.spaces.remove(space)

    def held(self, _: str) -> list[Any]:
        """Return who is held."""
        return list(self.spaces)


def test_who_waits_for_whom() -> None:
    """Whoever maps the file that is awaited, until it is not; others are read at once."""
    reads, meta = Reads(), Meta(files=["one"])
    worker: Any = SimpleNamespace(dispatcher=reads, meta=meta, waiting={})
    worker.note_meta = lambda *, files: setattr(meta, "files", files)
    files = CommonFiles(worker)
    assert files.of("") is None
    one = files.of("one")
    assert one is files.of("one") is not files.of("two")
    first, other, private = (SimpleNamespace(file=files.of(name)) for name in ("one", "two", ""))
    come: list[Any] = [first, other, private]
    files.served(come)
    assert reads.spaces == [first]
    files.await_more()
    assert reads.spaces == []
    assert meta.files == []


def test_what_is_emptied_while_another_waits() -> None:
    """It is so for that one, too, if it maps the same file."""
    worker: Any = SimpleNamespace(waiting={})
    files = CommonFiles(worker)
    one = files.of("one")
    assert one is not None
    space: Any = SimpleNamespace(mappings=Mappings([Mapping(0, 4, 20)]), closing=False, is_gone=False)
    waiting = {name: SpaceState(7, -1, 1, 0, 1, name, file=name) for name in ("one", "two")}
    for at, state in enumerate(waiting.values()):
        state.mappings.add(100, 110, 20)
        worker.waiting[at] = state
    assert list(one.elsewhere(space, 1, 3)) == []
    assert list(waiting["one"].mappings) == [Mapping(100, 101, 20), Mapping(101, 103, ZEROS), Mapping(103, 110, 23)]
    assert list(waiting["two"].mappings) == [Mapping(100, 110, 20)]
    assert [state.changed for state in waiting.values()] == [True, False]
