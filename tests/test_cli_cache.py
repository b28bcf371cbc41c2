"""`cli.cache`: the commands, as a user runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiouffd.cli import main
from aiouffd.store.cache import ChunkCache
from aiouffd.store.codecs import digest

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

MIB = 1 << 20


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """Run a command; return what it prints."""
    capsys.readouterr()
    assert main(["cache", *arguments]) == status, capsys.readouterr()
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other."""
    folder = str(tmp_path / "cache")
    cache = ChunkCache(folder, 64 * MIB)
    cache.add([(digest(b"%d" % n), bytes([n + 1]) * MIB) for n in range(12)])
    cache.count(hits=1234)
    cache.close()
    ChunkCache(folder, 64 * MIB).flush()
    cache.flush()
    assert "chunks     12\n" in run(capsys, "info", folder)
    assert run(capsys, "verify", folder) == f"{folder}: all is well\n"
    path = min((tmp_path / "cache").glob("*.segment"))
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"damaged")
    assert "1 of 12 chunks were damaged" in run(capsys, "verify", folder, status=1)
    assert run(capsys, "verify", folder) == f"{folder}: all is well\n"
    assert "1 segment removed" in run(capsys, "trim", folder, "--size", "8M")
    assert "1 segment removed" in run(capsys, "clear", folder)
    assert "segments   0\n" in run(capsys, "info", folder)


def test_what_is_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is made there."""
    (tmp_path / "empty").mkdir(0o700)
    assert "there is no cache" in run(capsys, "info", str(tmp_path / "empty"), status=1)
    assert not list((tmp_path / "empty").iterdir())
    run(capsys, "clear", str(tmp_path / "missing"), status=2)
