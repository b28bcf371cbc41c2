"""`sources.layered`: files in layers, against bytes that are written one over the other."""

from __future__ import annotations

import asyncio
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern import PAGE, Pattern, Slow, content, peek

import aiouffd
from aiouffd.sources.layered import LayeredSource

PAGES = 24
SIZE = PAGES * PAGE


def sparse(path: Path, pages: dict[int, bytes], size: int = SIZE) -> Path:
    """Write a file that has data in some pages only."""
    with path.open("wb") as file:
        file.truncate(size)
        for page, fill in pages.items():
            os.pwrite(file.fileno(), fill * PAGE, page * PAGE)
    return path


LAYER = st.dictionaries(st.integers(0, PAGES - 1), st.sampled_from([b"\0", b"a", b"b", b"c"]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=5), st.booleans(), st.lists(st.tuples(*[st.integers(0, SIZE - 1)] * 2)))
def test_any_layers_against_bytes(layers: list[dict[int, bytes]], far: bool, ranges: list[tuple[int, int]]) -> None:
    """Each way has the same: read, at once, by address, and as holes; over a file or another source."""
    with tempfile.TemporaryDirectory() as folder:
        model = bytearray(content(0, SIZE) if far else bytes(SIZE))
        paths = []
        for number, pages in enumerate(layers):
            paths.append(sparse(Path(folder) / str(number), pages))
            for page, fill in pages.items():
                model[page * PAGE : (page + 1) * PAGE] = fill * PAGE
        source = LayeredSource([Pattern(SIZE), *paths] if far else paths)
        assert source.size == SIZE
        asyncio.run(compare(source, bytes(model), [*ranges, (0, SIZE)], layers, far=far))


async def compare(source: LayeredSource, model: bytes, ranges: Any, layers: Any, *, far: bool) -> None:
    """Ask for ranges in each way."""
    for start, end in ranges:
        low, high = min(start, end), max(start, end) + 1 if end < SIZE else SIZE
        expected = model[low:high]
        assert bytes(await source.read(low, high - low)) == expected
        at_once = source.read_nowait(low, high - low)
        assert at_once is None or bytes(at_once) == expected
        address = source.locate(low, high - low)
        assert address is None or peek(address, high - low) == expected
        assert at_once is not None or address is not None
        hole = source.hole(low, high - low)
        page = low // PAGE
        known = not far and not any(page in pages for pages in layers)
        assert (hole > 0) == known
        assert not any(model[low : low + hole])
        assert bool(hole) or source.page(low, 1) is not None or far
    await source.aclose()


async def test_fragments_of_many_files_are_one_read(tmp_path: Path) -> None:
    """Also of a layer that has nothing in memory, which is asked once; what it is asked for in vain is its error."""
    asked = []

    class Far(Slow):
        async def read(self, offset: int, length: int) -> bytes:
            asked.append((offset, length))
            if offset == PAGE:
                raise aiouffd.SourceError(repr(self), offset, length, "not today")
            return await super().read(offset, length)

    paths = [sparse(tmp_path / str(n), {n: b"x", n + 8: b"y"}) for n in (2, 4, 6)]
    source = LayeredSource([Far(SIZE), *paths])
    data = bytes(await source.read(0, 12 * PAGE))
    expected = bytearray(content(0, 12 * PAGE))
    for page, fill in ((2, b"x"), (4, b"x"), (6, b"x"), (10, b"y")):
        expected[page * PAGE : (page + 1) * PAGE] = fill * PAGE
    assert data == expected
    assert asked == [(0, 12 * PAGE)]
    assert not source.local
    with pytest.raises(aiouffd.SourceError, match="not today"):
        await source.read(PAGE, PAGE)


def test_a_longer_file_over_a_shorter_one(tmp_path: Path) -> None:
    """Behind the lower one's end are zeros; the other way round is a file that was cut."""
    short, long = sparse(tmp_path / "short", {0: b"a"}, 2 * PAGE), sparse(tmp_path / "long", {3: b"b"})
    source = LayeredSource([short, long])
    assert source.size == SIZE
    assert bytes(asyncio.run(source.read(0, 4 * PAGE))) == b"a" * PAGE + bytes(2 * PAGE) + b"b" * PAGE
    with pytest.raises(aiouffd.SourceError, match=f"has {2 * PAGE} bytes, and .*long.* has {SIZE}"):
        LayeredSource([long, short])


def test_what_cannot_be_a_layer(tmp_path: Path) -> None:
    """No layers, an upper one that has no holes to tell of, no file."""
    path = sparse(tmp_path / "file", {})
    with pytest.raises(ValueError, match="at least one"):
        LayeredSource([])
    with pytest.raises(TypeError, match="no source that can be the lowest"):
        LayeredSource([path, Pattern(SIZE)])
    with pytest.raises(TypeError, match="no path"):
        LayeredSource([7])  # type: ignore[list-item]
    with pytest.raises(aiouffd.SourceError, match="cannot be opened"):
        LayeredSource([path, tmp_path / "missing"])


async def test_a_layer_that_is_written_later(tmp_path: Path) -> None:
    """Pages of it are an error, alone and among others; those of the others are as they were."""
    base, diff = sparse(tmp_path / "base", {0: b"a", 1: b"b"}), sparse(tmp_path / "diff", {1: b"c"})
    source = LayeredSource([base, diff])
    sparse(diff, {0: b"d", 1: b"d"})
    assert bytes(await source.read(0, PAGE)) == b"a" * PAGE
    for offset, length in ((PAGE, PAGE), (0, 2 * PAGE)):
        with pytest.raises(aiouffd.SourceError, match="written after it was opened"):
            await source.read(offset, length)


def test_layers_of_which_nothing_is_seen_are_closed(tmp_path: Path) -> None:
    """A thousand that one hides take no descriptors."""
    paths = [sparse(tmp_path / str(n), {n: b"a"}) for n in range(20)]
    top = sparse(tmp_path / "top", dict.fromkeys(range(20), b"t"))
    before = len([*Path("/proc/self/fd").iterdir()])
    source = LayeredSource([*paths, top])
    assert len(source.layers) == 1
    assert len([*Path("/proc/self/fd").iterdir()]) == before + 1
    assert source.identity == LayeredSource([top]).identity
    assert LayeredSource([Pattern(SIZE), paths[0]]).identity is None
    again = pickle.loads(pickle.dumps(LayeredSource([*paths, top])))
    assert (again.size, again.identity) == (SIZE, source.identity)


def test_what_a_recording_compares(tmp_path: Path) -> None:
    """Samples are of the bytes shown; of a layer that gives none, nothing."""
    base, diff = sparse(tmp_path / "base", {0: b"a", 1: b"b"}), sparse(tmp_path / "diff", {1: b"c"})
    assert LayeredSource([base, diff]).sample(PAGE - 1, PAGE + 2) == b"a" + b"c" * PAGE + b"\0"
    assert LayeredSource([Pattern(SIZE), diff]).sample(PAGE - 1, PAGE + 2) == b"c" * PAGE


def test_limits_of_the_lowest_layer(tmp_path: Path) -> None:
    """What a source that retries by itself says of time and tries holds for all; it is told what the Monitor has."""

    class Patient(Pattern):
        retries, timeout = 0, 1.0

        def begin(self, timeout: float, _retries: int, _on_retry: Any) -> None:
            """Take the Monitor's."""
            self.timeout = timeout

    source: Any = LayeredSource([Patient(SIZE), sparse(tmp_path / "diff", {1: b"c"})])
    assert (source.retries, source.timeout) == (0, 1.0)
    source.begin(7.0, None, print)
    assert source.timeout == 7.0
    plain: Any = LayeredSource([sparse(tmp_path / "base", {1: b"c"})])
    plain.begin(7.0, None, print)
    assert not hasattr(plain, "timeout")


def test_what_handlers_copy_from(tmp_path: Path) -> None:
    """The parts of each file, and none where there are too many."""
    base, diff = sparse(tmp_path / "base", {0: b"a", 1: b"b"}), sparse(tmp_path / "diff", {1: b"c", 4: b"c"})
    source = LayeredSource([base, diff])
    assert [(start // PAGE, end // PAGE) for start, end, _ in source.memories()] == [(0, 1), (1, 2), (4, 5)]
    for start, _, (address, length, fd, _) in source.memories():
        assert length == SIZE
        assert fd >= 0
        assert peek(address + start, 1) == (b"a" if start == 0 else b"c")
