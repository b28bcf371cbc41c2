"""`cli.demo_server`: the file that the demo maps, over HTTP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from aiouffd.cli.demo_server import serving

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
            with urllib.request.urlopen(url.rpartition("/")[0] + "/-sent") as answer:
                assert answer.read() == b"100"
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


async def test_a_folder(tmp_path: Path) -> None:
    """All files in it, at any depth, and none beside it."""
    await asyncio.to_thread((tmp_path / "in" / "below").mkdir, parents=True)
    await asyncio.to_thread((tmp_path / "in" / "below" / "x").write_bytes, DATA)
    await asyncio.to_thread((tmp_path / "outside").write_bytes, DATA)

    def ask(url: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(url) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, b""

    async with serving(tmp_path / "in", 0) as url:
        assert await asyncio.to_thread(ask, f"{url}/below/x") == (200, DATA)
        assert (await asyncio.to_thread(ask, f"{url}/%2e%2e/outside"))[0] == 404
        assert (await asyncio.to_thread(ask, f"{url}/below"))[0] == 404
