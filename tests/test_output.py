"""`report.output`: files that are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from aiouffd.report.output import check, write

if TYPE_CHECKING:
    from pathlib import Path


def names(folder: Path) -> list[str]:
    """Return what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """What cannot be encoded is escaped; a link stays; nothing else is left in the folder."""
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    assert check(link) == real
    assert names(tmp_path) == ["link"]
    write(check(link), "one")
    kept = real.open()
    write(check(link), "zwö\udcff")
    assert (kept.read(), real.read_text(encoding="utf-8")) == ("one", "zwö\\udcff")
    kept.close()
    assert names(tmp_path) == ["link", "real"]
    assert link.is_symlink()
    mask = os.umask(0o077)
    os.umask(mask)
    assert real.stat().st_mode & 0o777 == 0o666 & ~mask


def test_where_no_file_can_be_is_told_before(tmp_path: Path) -> None:
    """With the path that was given."""
    os.mkfifo(tmp_path / "fifo")
    for path, number in (
        *((tmp_path / "fifo", errno.EINVAL), (tmp_path, errno.EINVAL)),
        *((tmp_path / "no" / "x", errno.ENOENT), (tmp_path / "fifo" / "x", errno.ENOTDIR)),
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - its number is looked at
            check(path)
        assert (caught.value.errno, caught.value.filename) == (number, str(path))


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    """And no part of the new one."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError):
        write(path, None)  # type: ignore[arg-type]
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])
    with pytest.raises(OSError) as caught:  # noqa: PT011 - what it names is looked at
        write(tmp_path / "no" / "x", "")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / "no" / "x"))
