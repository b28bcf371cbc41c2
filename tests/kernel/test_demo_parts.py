"""`cli.demo_parts`: what the demos check and draw."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import rich.console

import aiouffd
from aiouffd.cli.demo_parts import Check, picture

if TYPE_CHECKING:
    from pathlib import Path


def test_a_wrong_byte_is_noticed(tmp_path: Path) -> None:
    """One byte that differs from the file is the offset of a wrong piece."""
    path = tmp_path / "x"
    path.write_bytes(bytes(8192))
    check = Check(path)
    check.compare(0, memoryview(bytes(4096)))
    check.compare(4096, memoryview(bytes(4095) + b"x"))
    check.close()
    assert check.wrong == [4096]
    assert (check.bytes, check.touched.total) == (8192, 8192)
    console = rich.console.Console(file=io.StringIO())
    assert check.report(console) == 1
    assert "WRONG: 1 pieces differ from the file, the first at 0x1000" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_picture_shows_what_is_present() -> None:
    """The first half of a region is present."""
    region = aiouffd.Region(80 * 8 * 4096)
    region[: len(region) // 2] = b"x" * (len(region) // 2)
    assert picture(region, 80, plain=True) == ["#" * 80] * 4 + [" " * 80] * 4
