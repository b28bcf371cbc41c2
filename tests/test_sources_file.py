"""`FileSource`: no wrong byte from files that were cut, no wait for file systems that cannot tell."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest
from loops import run

import aiouffd
from aiouffd.sources.resolve import as_source

if TYPE_CHECKING:
    from pathlib import Path

DATA = bytes(range(1, 256)) * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file without a zero byte."""
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    return path


@run
async def test_a_page_that_was_cut_in_two_is_not_located(path: Path) -> None:
    """The kernel fills the rest of such a page with zeros: it is a ShortReadError, what lies before it is read."""
    source = aiouffd.FileSource(path)
    assert source.locate(4096, 4096) is not None
    os.truncate(path, 5000)
    assert source.locate(4096, 4096) is None
    with pytest.raises(aiouffd.ShortReadError, match="ends at 5000"):
        await source.read(4096, 4096)
    assert bytes(await source.read(0, 4096)) == DATA[:4096]
    await source.aclose()


def test_a_file_system_without_nowait_is_read_by_a_thread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tmpfs may be read at once where RWF_NOWAIT is not known: NFS and FUSE would wait."""

    def refuse(*arguments: Any) -> int:
        if len(arguments) > 3:
            raise OSError(errno.EOPNOTSUPP, "no RWF_NOWAIT")
        raise AssertionError("read on the loop")

    source = aiouffd.FileSource(path)
    source._tells = False
    source._tmpfs = False
    monkeypatch.setattr(os, "preadv", refuse)
    assert source.read_nowait(0, 4096) is None


def test_an_empty_file(tmp_path: Path) -> None:
    """It has no bytes, and can be opened."""
    (tmp_path / "empty").touch()
    assert aiouffd.FileSource(tmp_path / "empty").size == 0


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    """Opening a FIFO returns at once with the reason: it is no regular file."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(aiouffd.SourceError, match="regular"):
        aiouffd.FileSource(tmp_path / "pipe")


def test_the_cause_is_kept(tmp_path: Path) -> None:
    """A missing file's SourceError comes from the FileNotFoundError."""
    with pytest.raises(aiouffd.SourceError) as caught:
        aiouffd.FileSource(tmp_path / "missing")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_file_url_of_another_host() -> None:
    """It is refused: it does not name a file of this machine."""
    with pytest.raises(aiouffd.SourceError, match="host"):
        as_source("file://elsewhere/etc/hostname")
