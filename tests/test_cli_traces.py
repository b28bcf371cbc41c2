"""`cli.traces`: the commands, as a user runs them."""

from __future__ import annotations

import json
from array import array
from typing import TYPE_CHECKING

from carried import carried, made
from pattern import PAGE

from aiouffd.cli import main
from aiouffd.engine.ahead.trace import Trace

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SIZE = 1 << 20
SOURCE = bytes([1]) + bytes(31)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """Run a command; return what it prints."""
    capsys.readouterr()
    assert main(["trace", *arguments]) == status, capsys.readouterr()
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Facts and a picture of one; one of several, also in place of one of them; what does not fit together is named."""
    paths = [str(tmp_path / name) for name in ("a", "b", "other", "out")]
    for path, pages, source in zip(paths, ([3, 4, 5, 9], [9, 1], [1]), (SOURCE, SOURCE, bytes([1]) * 32), strict=False):
        Trace(PAGE, SIZE, array("Q", [page * PAGE for page in pages]), source).save(path)
    picture = tmp_path / "a.svg"
    shown = run(capsys, "show", paths[0], "--svg", str(picture))
    for name, value in (("pages", "4"), ("bytes", "16,384"), ("share", "2 %"), ("ranges", "2"), ("in_order", "50 %")):
        assert f"{name:<12} {value}\n" in shown
    assert "by its size and samples" in shown
    assert picture.read_text().startswith("<svg")
    assert json.loads(run(capsys, "show", paths[0], "--json"))["size"] == SIZE
    assert run(capsys, "merge", *paths[:2], "-o", paths[3]) == f"{paths[3]}: 5 pages of 2 recordings\n"
    assert [offset // PAGE for offset in Trace.load(paths[3], source=SOURCE).offsets] == [3, 9, 4, 1, 5]
    run(capsys, "merge", *paths[:2], "-o", paths[0], "--by", "frequency", "--limit", "8K")
    assert [offset // PAGE for offset in Trace.load(paths[0]).offsets] == [9, 3]
    assert "another source" in run(capsys, "merge", *paths[1:3], "-o", paths[3], status=1)
    assert "smaller --at-least" in run(capsys, "merge", paths[1], "-o", paths[3], "--at-least", "2", status=1)
    assert "not a recording" in run(capsys, "show", str(picture), status=1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "a.svg", "b", "other", "out"]


def test_bytes_that_recordings_carry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are counted, and what is merged has them, up to a limit."""
    path, merged = made(tmp_path, [3, 4])[0], tmp_path / "merged"
    assert "carried      2\n" in run(capsys, "show", str(path))
    assert run(capsys, "merge", str(path), "-o", str(merged)).endswith("2 pages of 1 recording, the bytes of 2\n")
    assert set(carried(merged)) == {3, 4}
    assert run(capsys, "merge", str(path), "-o", str(merged), "--pages", "4K").endswith("the bytes of 1\n")
    assert run(capsys, "merge", str(merged), "-o", str(merged), "--pages", "0").endswith("1 recording\n")
    assert Trace.load(merged).pages is None
