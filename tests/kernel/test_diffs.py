"""`LayeredSource` behind Monitors and `aiouffd serve`: Firecracker's Diff snapshots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pattern import PAGE, PAGES, diffs
from scenario import eventually, play
from served import Serve, hand_over

import aiouffd


def served(engine: str, readahead: int, folder: str) -> None:
    """Scenario: each page by touch, backwards, and then all."""
    paths, model = diffs(folder)
    region = aiouffd.Region(PAGES * PAGE)
    source = aiouffd.LayeredSource(paths)
    chosen: Any = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}[engine]()
    with aiouffd.Monitor(region, source, engine=chosen, readahead=readahead) as monitor:
        for page in reversed(range(0, PAGES, 7)):
            assert region[page * PAGE : page * PAGE + 8] == model[page * PAGE : page * PAGE + 8]
        assert bytes(region) == model
        eventually(lambda: monitor.statistics().pages >= PAGES, True)
        assert readahead or monitor.statistics().pages_zero >= PAGES // 16
        assert monitor.statistics().source_errors == 0


@pytest.mark.parametrize("readahead", [0, 2 << 20])
@pytest.mark.parametrize("engine", ["pager", "in_thread"])
def test_layers_behind_a_monitor(engine: str, readahead: int, tmp_path: Path) -> None:
    """Every byte, by each engine, page by page and in windows; holes of all layers are mapped as zeros."""
    play(served, engine, readahead, str(tmp_path))


def in_the_handler(folder: str) -> None:
    """Scenario: what lies in the page cache is placed by the thread that touches it."""
    paths, model = diffs(folder)
    region = aiouffd.Region(PAGES * PAGE)
    with aiouffd.Monitor(region, aiouffd.LayeredSource(paths), engine=aiouffd.InThread(), readahead=0) as monitor:
        pages = [page for page in range(PAGES) if page % 16 != 9][:100]
        assert all(region[page * PAGE] == model[page * PAGE] for page in pages)
        assert monitor._engine._counters.snapshot().faults == 0  # type: ignore[union-attr]
        assert monitor.statistics().pages_fault == 100


def test_resident_pages_of_layers_are_plain(tmp_path: Path) -> None:
    """`InThread` asks the loop for none of them."""
    play(in_the_handler, str(tmp_path))


def of_a_client(path: str, folder: str) -> None:
    """Scenario: a microVM's memory."""
    model = (Path(folder) / "model").read_bytes()
    region, _connection, _uffd = hand_over(path, PAGES * PAGE)
    assert bytes(region) == model


@pytest.mark.parametrize("way", ["source", "template"])
def test_a_server_of_diffs(way: str, tmp_path: Path) -> None:
    """`--diff`, beside a source and beside a template."""
    paths, model = diffs(str(tmp_path))
    (tmp_path / "model").write_bytes(model)
    if way == "template":
        paths = [f"{path}.{os.getuid()}" for path in paths]
        for path in paths:
            Path(path.rpartition(".")[0]).rename(path)
        paths = [path.rpartition(".")[0] + ".{uid}" for path in paths]
    base, monday, tuesday = paths
    first = ["--source-for", base] if way == "template" else [base]
    with Serve(tmp_path, *first, "--diff", monday, "--diff", tuesday) as serve:
        play(of_a_client, str(serve.path), str(tmp_path))
        assert serve.end() == 0


def test_a_diff_that_is_not_there(tmp_path: Path) -> None:
    """The command says so."""
    paths, _ = diffs(str(tmp_path))
    serve = Serve(tmp_path, paths[0], "--diff", str(tmp_path / "missing"), wait=False)
    assert serve.process.wait(60) == 1
    assert "missing" in serve.said
