"""`store.image`: what a snapshot is made from."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

import aiouffd
from aiouffd import Range
from aiouffd.store import create_sync
from aiouffd.store.image import Changed, open_diff, open_image

if TYPE_CHECKING:
    from pathlib import Path

    from aiouffd.store.image import Image


def whole(image: Image) -> bytes:
    """Return what the extents of an image give, with zeros between them."""
    data = bytearray(image.size)
    for start, end in image.extents():
        data[start:end] = image.read(start, end - start)
    return bytes(data)


def test_a_sparse_file(tmp_path: Path) -> None:
    """Its holes are not read."""
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"a" * 5000)
        file.truncate(4 << 20)
    image = open_image(path)
    assert whole(image) == path.read_bytes()
    assert sum(end - start for start, end in image.extents()) < 1 << 20
    image.close()


@pytest.mark.parametrize("size", [1, 4096, 100_003])
def test_a_file_without_holes(tmp_path: Path, size: int) -> None:
    """All of it."""
    (tmp_path / "x").write_bytes(os.urandom(size))
    image = open_image(str(tmp_path / "x"))
    assert whole(image) == (tmp_path / "x").read_bytes()
    image.close()


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(b"b" * 5000), lambda path: os.truncate(path, 5)])
def test_a_file_that_changes(tmp_path: Path, harm: Any) -> None:
    """It is an error, at the end at the latest."""
    path = tmp_path / "x"
    path.write_bytes(b"a" * 5000)
    os.utime(path, ns=(0, 0))
    image = open_image(path)
    image.read(0, 5)
    harm(path)
    with pytest.raises(aiouffd.SourceError, match="the file has changed while it was read"):
        image.close()


def test_a_file_that_was_replaced_is_another(tmp_path: Path) -> None:
    """It was not this one that was opened."""
    path = tmp_path / "x"
    path.write_bytes(b"a" * 5000)
    image = open_image(path)
    path.unlink()
    path.write_bytes(b"b" * 5000)
    assert image.read(0, 5000) == b"a" * 5000
    image.close()


def test_a_file_that_is_cut(tmp_path: Path) -> None:
    """To read what is there no longer is an error."""
    path = tmp_path / "x"
    path.write_bytes(b"a" * 5000)
    image = open_image(path)
    os.truncate(path, 10)
    with pytest.raises(aiouffd.ShortReadError, match="the file ended at 10"):
        image.read(0, 5000)
    with pytest.raises(aiouffd.SourceError):
        image.close()


class Odd:
    """A source with a hole, which fails as it is told to."""

    size = 5 << 20

    def __init__(self, failure: Exception | None = None, missing: int = 0) -> None:
        self.failure = failure
        self.missing = missing
        self.closed = False

    def hole(self, offset: int, length: int) -> int:
        """Return that the second MiB is a hole."""
        return min(length, (2 << 20) - offset) if 1 << 20 <= offset < 2 << 20 else 0

    async def read(self, offset: int, length: int) -> bytes:
        """Return the number of the MiB."""
        if self.failure is not None:
            raise self.failure
        return bytes([1 + (offset >> 20)]) * (length - self.missing)

    async def aclose(self) -> None:
        """Note it."""
        self.closed = True


def test_any_source() -> None:
    """With its holes."""
    source = Odd()
    image = open_image(source)
    assert next(iter(image.extents())) == (0, 1 << 20)
    data = whole(image)
    assert data[1 << 20 : 2 << 20] == bytes(1 << 20)
    assert [data[at << 20] for at in range(5)] == [1, 0, 3, 4, 5]
    image.close()
    assert source.closed


def test_a_buffer() -> None:
    """It is read where it is."""
    image = open_image(bytearray(b"abc"))
    assert whole(image) == b"abc"
    image.close()


@pytest.mark.parametrize(
    ("source", "kind", "complaint"),
    [
        (Odd(OSError(5, "broken")), aiouffd.SourceError, "broken"),
        (Odd(aiouffd.SourceError("x", 0, 1, "gone")), aiouffd.SourceError, "gone"),
        (Odd(missing=1), aiouffd.ShortReadError, "gave 4095 bytes of 4096"),
    ],
)
def test_a_source_that_fails(source: Odd, kind: type[Exception], complaint: str) -> None:
    """It is an error of the source."""
    image = open_image(source)
    with pytest.raises(kind, match=complaint):
        image.read(0, 4096)
    image.close()


def test_a_source_that_cannot_be_closed() -> None:
    """It is an error of the source, too; its thread ends."""

    class Unclosable(Odd):
        async def aclose(self) -> None:
            """Fail."""
            raise OSError(5, "broken")

    image = open_image(Unclosable())
    with pytest.raises(aiouffd.SourceError, match="broken"):
        image.close()
    assert "aiouffd-image" not in [thread.name for thread in threading.enumerate()]


def test_only_some_of_an_image() -> None:
    """Ranges that touch are one, and what is behind the end is left out."""
    image = Changed(open_image(b"abcdef"), [Range(4, 10), Range(0, 1), Range(1, 1), Range(9, 1)])
    assert list(image.extents()) == [(0, 2), (4, 6)]
    assert bytes(image.read(4, 2)) == b"ef"
    image.close()


def test_a_diff_of_a_snapshot(tmp_path: Path) -> None:
    """All of it, and where it may differ."""
    create_sync(b"a" * 100_000, tmp_path / "x.snap")
    with (tmp_path / "diff").open("wb") as file:
        file.seek(8192)
        file.write(b"b" * 4096)
        file.truncate(100_000)
    image, changed = open_diff(tmp_path / "diff", tmp_path / "x.snap", None)
    assert changed == [Range(8192, 4096)]
    assert bytes(image.read(0, 100_000)) == b"a" * 8192 + b"b" * 4096 + b"a" * (100_000 - 12288)
    image.close()
