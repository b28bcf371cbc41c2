"""The benchmarks: they run, they check what they read, and they put back what they set."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_a_quick_run_compares_with_the_peers(tmp_path: Path) -> None:
    """Two rows, small: a table with the peers and their ratios, and the figures as JSON."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--repeats", "2", "--rows", "random-1,latency-64"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=100, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    for words in ("random 4 KiB touches", "C poll", "C spin", "ideal"):
        assert words in result.stdout
    (path,) = tmp_path.glob("*.json")
    figures = {item["row"]: item for item in json.loads(path.read_text())["results"]}
    assert set(figures["random-1"]["ratios"]) == {"C poll", "C spin", "bare Python"}
    assert all(value > 0 for values in figures["random-1"]["figures"].values() for value in values)
    assert figures["latency-64"]["ratios"]["ideal"]["median"] >= 1  # nobody is faster than the source


def test_wrong_bytes_are_noticed() -> None:
    """A contestant that serves something else fails, instead of being fast."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    code = """
import numpy as np, aiouffd
from benchmarks.native import touch
try:
    with aiouffd.Monitor(aiouffd.Region(1 << 20)) as monitor:
        touch(monitor.region.address, np.arange(4, dtype=np.uint32))
except AssertionError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert "4 of 4 pages had the wrong content" in result.stdout, result.stderr
