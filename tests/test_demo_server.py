"""`cli.demo_server`: the file that the demo maps, over HTTP."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

DATA = bytes(range(256)) * 64


def test_ranges_until_the_input_ends(tmp_path: Path) -> None:
    """It prints the URL, answers HEAD and ranges with a strong ETag, and ends with its parent's end of the pipe."""
    path = tmp_path / "x.bin"
    path.write_bytes(DATA)
    command = [sys.executable, "-P", "-m", "aiouffd.cli.demo_server", str(path), "0.01"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as head:
                assert head.headers["Content-Length"] == str(len(DATA))
                assert head.headers["ETag"].startswith('"')
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=100-199"})) as answer:
                assert (answer.status, answer.read()) == (206, DATA[100:200])
            process.stdin.close()
            assert process.wait(30) == 0
        finally:
            process.kill()
