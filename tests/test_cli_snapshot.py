"""`cli.snapshot`: the commands, as a user runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from snapshots import CHUNK, an_image, damage, packs_of, read_all

from aiouffd.cli import main
from aiouffd.engine.ahead.trace import Recorder

if TYPE_CHECKING:
    from pathlib import Path

DATA = bytes(CHUNK) + an_image(51, 19, 1)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an image, a changed one, and a recording; the working directory."""
    (tmp_path / "vm.mem").write_bytes(DATA)
    (tmp_path / "changed.mem").write_bytes(b"!" + DATA[1:])
    recorder = Recorder.create(tmp_path / "trace", 4096, len(DATA))
    recorder.note(0)
    recorder.complete()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    """Run a command; return what it prints."""
    capsys.readouterr()
    assert main(["snapshot", *line.split()]) == status, capsys.readouterr()
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_the_commands(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other."""
    run("create vm.mem st/a.snap --trace trace --codec lz4 --page-size 16K", capsys)
    run("create changed.mem st/b.snap --base st/a.snap --level 5", capsys)
    text = run("info st/b.snap", capsys)
    assert f"image      {len(DATA):,} bytes" in text
    assert "base       a.snap" in text
    assert "zstd: 1" in text
    assert "lz4: " in text
    assert "recording  48 bytes" not in text
    text = run("info st/a.snap", capsys)
    assert "pages      16,384 bytes" in text
    assert f"recording  {(there / 'trace').stat().st_size} bytes" in text
    assert "has a recording of 80 bytes" in run("attach st/b.snap trace", capsys)
    assert "has a recording of 80 bytes" in run("attach st/b.snap trace --by replace --limit 4K", capsys)
    assert "recording  80 bytes" in run("info st/b.snap", capsys)
    assert "no such snapshot" in run("attach st/none.snap trace", capsys, status=1)
    assert run("verify st/a.snap", capsys) == "st/a.snap: all is well\n"
    assert run("diff st/a.snap st/b.snap", capsys, status=1) == f"0 {CHUNK}\n"
    assert run("diff st/a.snap st/a.snap", capsys) == ""
    run("extract st/b.snap out", capsys)
    assert (there / "out").read_bytes() == (there / "changed.mem").read_bytes()
    with (there / "diff.mem").open("wb") as file:
        file.write(bytes(4096))
        file.truncate(len(DATA))
    run("create diff.mem st/c.snap --base st/b.snap --diff", capsys)
    assert run("diff st/a.snap st/c.snap", capsys) == ""
    (there / "st" / "c.snap").unlink()
    run("copy st/b.snap to/c.snap", capsys)
    run("flatten to/c.snap to/d.snap --chunk 128K --codec none", capsys)
    assert run("diff st/b.snap to/d.snap", capsys) == ""
    (there / "to" / "c.snap").unlink()
    assert "would be removed" in run("gc to --grace 0 --dry-run", capsys)
    assert run("gc to", capsys) == "0 objects, 0 bytes removed\n"
    text = run("gc to --grace 0", capsys)
    assert text.count("packs/") == 2
    assert "3 objects" in text
    assert read_all(there / "to" / "d.snap") == (there / "changed.mem").read_bytes()


def test_damage_is_told(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a line for each, and the status."""
    run("create vm.mem st/a.snap", capsys)
    (pack,) = packs_of(there / "st")
    damage(pack, pack.stat().st_size - 1)
    text = run("verify st/a.snap", capsys, status=1)
    assert "st/a.snap: 1 objects or chunks are damaged or missing" in text
    assert f"{pack}, chunk 20" in text
    assert "it is damaged" in run("extract st/a.snap out", capsys, status=1)


@pytest.mark.parametrize(
    ("line", "status", "complaint"),
    [
        ("create vm.mem vm.mem", 1, "the name of a snapshot ends with .snap"),
        ("create missing st/a.snap", 1, "missing"),
        ("create vm.mem st/a.snap --codec gzip", 2, "gzip"),
        ("create vm.mem st/a.snap --chunk 1K", 2, "from 65536 to"),
        ("create vm.mem st/a.snap --chunk 100000", 2, "no power of two"),
        ("info st/a.snap", 1, "st: it is missing"),
        ("gc nowhere", 1, "it is missing"),
    ],
)
def test_what_is_refused(
    there: Path, capsys: pytest.CaptureFixture[str], line: str, status: int, complaint: str
) -> None:
    """With one line that says why."""
    text = run(line, capsys, status=status)
    assert complaint in text
    assert "Traceback" not in text
    assert not list(there.glob("**/*.snap"))
