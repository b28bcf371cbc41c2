"""`store.cache_files`: the folder of a cache, and the lock against those who change it."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from aiouffd.store.cache_files import CacheFiles, open_folder

if TYPE_CHECKING:
    from pathlib import Path


def test_a_folder_is_its_users_own(tmp_path: Path) -> None:
    """It is made so, with those above it; one that others may enter is refused, and so is what is no folder."""
    path = tmp_path / "above" / "cache"
    open_folder(str(path)).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    open_folder(str(path)).close()
    path.chmod(0o750)
    with pytest.raises(PermissionError, match="others may enter"):
        open_folder(str(path))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        open_folder(str(tmp_path / "file"))


def test_one_changes_it_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a block it is entered again; others are kept out until the outermost one ends, however that is."""
    monkeypatch.setattr("aiouffd.store.cache_files._PATIENCE", 0.01)
    ours, theirs = (CacheFiles(str(tmp_path / "cache"), 64 << 20) for _ in range(2))
    with ours.exclusive():
        with pytest.raises(ZeroDivisionError), ours.exclusive():
            _ = 1 // 0
        with pytest.raises(TimeoutError, match="keeps it locked"), theirs.exclusive():
            raise AssertionError
    with theirs.exclusive():
        pass
