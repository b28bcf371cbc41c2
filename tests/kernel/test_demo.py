"""`aiouffd demo`: it checks what it touches, shows what is present, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from processes import descendants, ended

if TYPE_CHECKING:
    from pathlib import Path

DEMO = [sys.executable, "-m", "aiouffd", "demo"]


def test_the_demo_checks_every_byte() -> None:
    """64 MiB: exit status 0, and what came is printed: touched, fetched, faults, latency, a map."""
    command = [*DEMO, "--size", "64M", "--touches", "500"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    for words in ("touched", "fetched", "page faults", "p50", "p99", "Every touched byte is right"):
        assert words in output
    assert re.search(r"\|[ .:+#]{20,}\|", output)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
def test_nothing_is_left_of_a_demo_that_is_ended(number: signal.Signals, status: int, tmp_path: Path) -> None:
    """The HTTP server and both processes of the pager end; its input file, too, unless it is killed.

    The signal comes as from a terminal, to all of the process group, while threads touch.
    """
    command = [*DEMO, "--size", "64M", "--touches", "16000", "--latency-ms", "5", "--threads", "2"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, env=environment)
    try:
        family: set[int] = set()
        end = time.monotonic() + 60
        while len(family) < 3 and time.monotonic() < end:
            family = descendants(process.pid)
            time.sleep(0.01)
        assert len(family) == 3
    finally:
        os.killpg(process.pid, number)
        assert process.wait(60) == status
    assert all(ended(pid) for pid in family)
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())
