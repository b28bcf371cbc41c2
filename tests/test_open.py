"""`aiouffd.open`: what it takes, and when it asks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

import aiouffd
from aiouffd.monitor import map as module

if TYPE_CHECKING:
    from pathlib import Path


def test_nothing_is_asked_before_the_block(tmp_path: Path) -> None:
    """A path that is not there is an error of the block, and names the path."""
    opened = aiouffd.open(tmp_path / "nothing")
    with pytest.raises(aiouffd.SourceError, match="nothing"), opened:
        pass


def test_an_empty_source_cannot_be_mapped() -> None:
    """It is told, and nothing is mapped."""
    with pytest.raises(aiouffd.SourceError, match="it is empty"), aiouffd.open(b""):
        pass


@pytest.mark.parametrize("option", [{"on_exit": "explode"}, {"fork": "often"}, {"retries": -1}, {"readahead": -1}])
def test_options_are_those_of_a_monitor(option: dict[str, Any]) -> None:
    """Each is refused by its name."""
    with pytest.raises(ValueError, match=next(iter(option))), aiouffd.open(b"bytes", **option):
        pass


def test_no_source_is_asked_that_has_no_time() -> None:
    """A timeout of nothing is refused by its name, and not told as one of the source's."""
    with pytest.raises(ValueError, match="'timeout' must be > 0"), aiouffd.open("http://127.0.0.1:1/x", timeout=0):
        pass


def test_an_option_that_nobody_knows() -> None:
    """It is a TypeError, as for any function, before anybody is asked."""
    with pytest.raises(TypeError, match=r"open\(\) got an unexpected keyword argument 'chunks'"):
        aiouffd.open("http://127.0.0.1:1/nothing", chunks=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'readahed'; the nearest that it takes is 'readahead'"):
        aiouffd.open("http://127.0.0.1:1/nothing", readahed=4)  # type: ignore[call-arg]


def test_options_reach_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else does."""
    asked: dict[str, Any] = {}

    def note(what: Any, **options: Any) -> aiouffd.Source:
        asked.update(options, what=what)
        raise aiouffd.SourceError(what, 0, 0, "asked")

    monkeypatch.setattr(module, "as_source", note)
    with (
        pytest.raises(aiouffd.SourceError, match="asked"),
        aiouffd.open("s3://bucket/key", storage_options={"region": "eu-west-1"}, readahead=0, timeout=5, retries=2),
    ):
        pass
    found = {"what": "s3://bucket/key", "options": {"region": "eu-west-1"}, "timeout": 5, "retries": 2}
    assert asked == {**found, "cache": None, "writable": False}
    cache = aiouffd.ChunkCache("cache", 8 << 20)
    with pytest.raises(aiouffd.SourceError, match="asked"), aiouffd.open("s3://bucket/key", cache=cache):
        pass
    assert asked["cache"] is cache


def test_its_length_is_the_sources(tmp_path: Path) -> None:
    """Which is looked for once, and is what is mapped then; a second block looks again."""
    path = tmp_path / "data"
    path.write_bytes(b"one")
    opened = aiouffd.open(path, engine=aiouffd.InThread())
    assert (len(opened), bool(opened)) == (3, True)
    path.unlink()
    with opened as region:
        assert region[:] == b"one"
    with pytest.raises(aiouffd.SourceError, match="data"), opened:
        pass


def test_without_a_block_it_says_what_to_do() -> None:
    """Its repr, and each error of who takes it for a region."""
    opened: Any = aiouffd.open("https://user:secret@host/x?signature=secret")
    todo = r"`with aiouffd\.open\(\.\.\.\) as region`, or `region = aiouffd\.map\(\.\.\.\)`"
    assert re.search(todo, repr(opened))
    assert "secret" not in repr(opened)
    for use in ("__getitem__", "__setitem__", "__iter__", "__buffer__"):  # the last is called by Python 3.12 and later
        with pytest.raises(TypeError, match=todo):
            getattr(opened, use)(0)
    with pytest.raises(AttributeError, match=f"'monitor', and nothing is mapped yet: {todo}"):
        _ = opened.monitor
    with pytest.raises(AttributeError, match="'Opened' has no attribute 'nonsense'"):
        _ = opened.nonsense
