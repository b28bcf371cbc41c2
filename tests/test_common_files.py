"""`pager.process.common_files`: no space is read before all have come that map its file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
    worker.waiting[7] = SpaceState(7, -1, 4096, 0, 1, "t", file="two")
    files.await_more()
    assert reads.spaces == []
    assert meta.files == []
    come = [first, other]
    files.served(come)
    assert reads.spaces == [other]
    worker.waiting.clear()
    files.served([])
    assert reads.spaces == []
