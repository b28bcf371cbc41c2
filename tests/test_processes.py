"""`processes`: what programs inherit from pytest, and that no process outlives its test."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
from blocking import loop_factories
from processes import KNOWN, descendants, end_all, ended

TESTS = Path(__file__).parent
SAMPLE = """
import os, subprocess, sys, time

CHILD = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']).pid)"

def orphan():
    with open("pid", "w") as file:
        subprocess.run([sys.executable, "-c", CHILD], check=True, stdout=file)

def test_sample():
    orphan()
    assert {holds}
"""


HANGS = """
import asyncio, threading

import pytest

pytestmark = pytest.mark.timeout(0.5, func_only=True)

async def waits():
    await asyncio.get_running_loop().create_future()

async def test_waits():
    await waits()

async def test_goes_on():
    with pytest.raises(asyncio.CancelledError):
        await waits()

async def test_blocks():
    threading.Event().wait()

def test_without_a_loop():
    threading.Event().wait()
"""


def _run(sample: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Have a pytest of its own run a file of tests beside our conftest.py."""
    shutil.copy(TESTS / "conftest.py", directory)
    # It is named after no module, so that what it starts is not measured.
    (directory / "test_sample.py").write_text(sample)
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", ".", "-c", str(TESTS.parent / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", *options, "test_sample.py"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "COVERAGE_PROCESS_X": "1"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_a_test_that_hangs_fails_on_each_loop(tmp_path: Path) -> None:
    """Where its loop goes on after a signal handler that raises, too; and it tells what it was waiting for."""
    result = _run(HANGS, tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{3 * len(loop_factories()) + 1} failed" in result.stdout, result.stdout
    assert "await asyncio.get_running_loop().create_future()" in result.stdout


@pytest.mark.parametrize("holds", [True, False])
def test_an_orphan_is_killed_and_blamed_on_its_own_test(tmp_path: Path, holds: bool) -> None:
    """A test that passed fails for it; of one that failed nothing is left either, and the next test runs."""
    sample = SAMPLE.format(holds=holds) + "\ndef test_next():\n    assert 'COVERAGE_PROCESS_X' not in os.environ\n"
    result = _run(sample, tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert ("it has left processes" in result.stdout) is holds
    assert ("2 passed, 1 error" if holds else "1 failed, 1 passed") in result.stdout
    assert ended(int((tmp_path / "pid").read_text()), 1)


def test_a_machine_that_stands_still_gives_processes_time_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have stood still, too, whatever the clock says then."""
    before, clock = descendants(os.getpid()), itertools.count(step=1000)
    ends = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    halted = SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: ends.communicate(b"\n"))
    monkeypatch.setattr(processes, "time", halted)
    assert end_all(before, patience=5.0) == set()


def test_programs_start_with_default_dispositions() -> None:
    """Also where pytest itself was started with signals ignored or blocked: neither is handed on."""
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "import processes\n"
        "processes.default_dispositions()\n"
        "signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGHUP)\n"
        "print(open('/proc/self/status').read())\n"
        "subprocess.run(['cat', '/proc/self/status'])\n"
    )
    command = [sys.executable, "-u", "-c", code]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = [line.split() for line in text.splitlines() if line.startswith(("SigIgn", "SigBlk"))]
    assert [int(value, 16) for name, value in fields if name == "SigBlk:"] == [0, 0]
    assert int([value for name, value in fields if name == "SigIgn:"][1], 16) & KNOWN == 0


def test_all_descendants_end() -> None:
    """Children of children, too; what was there before is left alone."""
    before = descendants(os.getpid())
    other = subprocess.Popen(["sleep", "100"])
    before_and_other = before | {other.pid}
    code = "import subprocess; subprocess.Popen(['sleep', '100']); subprocess.run(['sleep', '100'])"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        while len(fresh := descendants(os.getpid()) - before_and_other) < 3:
            pass
        assert end_all(before_and_other, patience=0) == fresh
    assert process.returncode in {0, -signal.SIGKILL}  # whichever of the two has waited for it
    assert other.poll() is None
    other.kill()
    other.wait()
