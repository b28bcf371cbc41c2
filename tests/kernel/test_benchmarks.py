"""The benchmarks: they run, they check what they read, and they put back what they set."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scenario import ended

from benchmarks import knobs, report

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def compiler() -> None:
    """The touchers are written in C."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")


def run(*options: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the benchmarks at their smallest."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == status, result.stderr
    return result


def test_a_quick_run_compares_with_the_peers(tmp_path: Path) -> None:
    """Two rows, small: a table with the peers and their ratios, on a page as well, and the figures as JSON."""
    page = tmp_path / "page.html"
    result = run("--repeats", "2", "--rows", "random-1,latency-64", "--output", tmp_path, "--html", page)
    assert page.read_text().count("<svg") == 4
    for words in ("random 4 KiB touches", "C poll", "C spin", "ideal"):
        assert words in result.stdout
    (path,) = tmp_path.glob("*.json")
    figures = {item["row"]: item for item in json.loads(path.read_text())["results"]}
    assert set(figures["random-1"]["ratios"]) == {"C poll", "C spin", "bare Python"}
    assert all(value > 0 for values in figures["random-1"]["figures"].values() for value in values)
    assert figures["latency-64"]["ratios"]["ideal"]["median"] >= 1  # nobody is faster than the source


def test_parts_of_files_of_arrays(tmp_path: Path) -> None:
    """Of a tensor no more is fetched than its pages and the header, beside a download and fsspec; rows are compared."""
    run("--repeats", "1", "--rows", "tensor-bytes,rows,rows-replay", "--output", tmp_path)
    (path,) = tmp_path.glob("*.json")
    figures = {item["row"]: item["figures"] for item in json.loads(path.read_text())["results"]}
    ours, whole, fsspec = (figures["tensor-bytes"][name][0] for name in ("aiouffd", "download", "fsspec"))
    assert ours < whole / 64 + 4 * 4096 / (1 << 20)
    assert ours < fsspec / 2
    assert set(figures["rows"]) == set(figures["rows-replay"]) == {"aiouffd", "obstore, 64 at once"}


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    """It has each row's configuration, a strip for each ratio, who was left out and why, and the pictures."""
    picture = tmp_path / "it.png"
    picture.write_bytes(b"bytes")
    ratio = {"median": 2.0, "quartiles": [1.0, 3.0], "bar": 1.5, "holds": False}
    row: dict[str, Any] = {"row": "r", "title": "a<b", "setup": "readahead=0", "unit": "us", "remark": None}
    row |= {"left_out": {"it": "no it"}, "figures": {"aiouffd": [2.0], "peer": [1.0]}, "ratios": {"peer": ratio}}
    absent = {"row": "s", "title": "guest", "remark": None, "left_out": {"aiouffd": "no KVM"}, "ratios": {}}
    page = report.page([row, absent], report.machine(kept=True, quick=False), [picture])
    assert '<tr class="missed"><td>a&lt;b<td>readahead=0<td>2.00 us<td>peer: 1.00<td>2.00 (1.00-3.00)' in page
    assert "Left out: a&lt;b, it: no it" in page
    assert "Left out: guest: no KVM" in page
    assert 'src="data:image/png;base64,Ynl0ZXM="' in page
    # The quartiles are to the right of 1, which is at two thirds of a scale from 0.01 to 10; the bar is between them.
    assert "M159.3 0V16" in page
    assert "M159.3 8H196.9" in page
    assert '<circle cx="183.0"' in page
    assert "M173.2 0V16" in page


def test_who_cannot_run_here_is_named(tmp_path: Path) -> None:
    """A guest, a FUSE file system and a restored server run beside ours, or it is said why not."""
    result = run("--repeats", "1", "--rows", "sequential,kvm,redis-server-end", "--output", tmp_path)
    assert ("pyfuse3 + mmap: " in result.stdout) != ("pyfuse3 + mmap is left out: " in result.stderr)
    assert ("of redis-server, until the daemon" in result.stdout) != ("redis-server-end is left out: " in result.stderr)
    assert ("present memory: " in result.stdout) != ("kvm is left out: " in result.stderr)


def test_a_row_that_does_not_exist() -> None:
    """Status 2, and its name."""
    assert "no such row: nonsense" in run("--rows", "nonsense", status=2).stderr


@pytest.mark.long
def test_pictures(tmp_path: Path) -> None:
    """Three PNGs that show something."""
    result = run("--plots", tmp_path)
    paths = [Path(line) for line in result.stdout.split()]
    assert sorted(path.name for path in paths) == ["latency.png", "touchers.png", "window.png"]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 10_000


def test_regimes_of_idle_processors(tmp_path: Path) -> None:
    """The row is run in both and the knob put back, or it is said why not."""
    before = knobs.regime()
    result = run("--repeats", "1", "--idle-regimes", "--output", tmp_path)
    if knobs.unavailable() is None:
        assert "idle cores halt at once" in result.stdout
        assert "idle cores poll for 200 us" in result.stdout
    else:
        assert "the regimes are left out" in result.stderr
    assert knobs.regime() == before


@pytest.mark.parametrize("number", [0, signal.SIGTERM, signal.SIGKILL])
def test_the_knob_is_put_back_whatever_happens(tmp_path: Path, number: int) -> None:
    """Also when the benchmark is killed while a peer is running, which ends with it."""
    knob = tmp_path / "knob"
    knob.write_text("17\n")
    code = f"""
import signal
from pathlib import Path
from benchmarks.contestants import child
from benchmarks.knobs import setting
with setting(Path({str(knob)!r}), "200000"), child(signal.pause) as pid:
    print(pid, flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        peer = int(process.stdout.readline())
        assert knob.read_text() == "200000"
        if number:
            process.send_signal(number)
        else:
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.wait(60) == -number
        end = time.monotonic() + 60
        while knob.read_text() != "17" and time.monotonic() < end:
            time.sleep(0.005)
        assert knob.read_text() == "17"
        assert ended(peer)


def test_wrong_bytes_are_noticed() -> None:
    """A contestant that serves something else fails, instead of being fast."""
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
