"""What a quiet client of a server waits for a page, alone and beside two that take all that they can."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import aiouffd
from aiouffd.cli.unix_http import ControlClient
from benchmarks import far, served
from benchmarks.contestants import PAGE, content
from benchmarks.native import touch
from benchmarks.row import MIB, Bar, Row, shuffled

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["fairness_rows", "quiet"]

_PAUSE = 0.002  # seconds between two touches of the quiet client
_AWAY = 0.002  # seconds to the web server
_TOUCHERS = 8  # of a storm


def quiet(size: int, touches: int, storms: int, *, remote: bool) -> float:
    """Touch pages now and then, beside so many clients that do so all the time and are filled; return the p99 in us.

    Args:
        size: bytes of each client's memory.
        touches: of the quiet one.
        storms: how many others there are.
        remote: the source is behind HTTP; else it is a file.
    """
    waits = np.zeros(touches, np.uint32)
    pages = shuffled(size)[:touches]
    with _clients(size, storms, remote=remote) as (address, stormy):
        ended = threading.Event()
        threads = [threading.Thread(target=_storm, args=(region, size, ended)) for region in stormy]
        for thread in threads:
            thread.start()
        try:
            for at in range(touches):
                time.sleep(_PAUSE)
                touch(address, pages[at : at + 1], latencies=waits[at : at + 1])
        finally:
            ended.set()
            for thread in threads:
                thread.join()
    return float(np.quantile(waits, 0.99)) / 1e3


def _storm(address: int, size: int, ended: threading.Event) -> None:
    for pages in np.array_split(shuffled(size), size // PAGE // 64):
        if ended.is_set():
            return
        touch(address, pages, _TOUCHERS)


@contextlib.contextmanager
def _clients(size: int, storms: int, *, remote: bool) -> Iterator[tuple[int, list[int]]]:
    """Yield the addresses of the memory of a quiet client and of the others: sessions of one server, and one source."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        if remote:
            source = f"http://127.0.0.1:{stack.enter_context(far.served(content(size).fd, size, _AWAY))}/file"
        else:
            source = str(Path(directory) / "memory.bin")
            Path(source).write_bytes(content(size).map or b"")
        control = Path(directory) / "control"
        command = [sys.executable, "-m", "aiouffd", "serve", "--control", str(control), "--recent", "0"]
        server = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        stack.callback(server.kill)
        served.criu_rig.until(control.exists, "server")
        client = ControlClient(control)
        addresses = []
        for number in range(storms + 1):
            path = Path(directory) / str(number)
            new = {"name": f"s{number}", "socket": str(path), "source": source, "readahead": 64 << 10 if number else 0}
            client.ask("POST", "/v1/sessions", {**new, "background": "max" if number else 0})
            region = aiouffd.Region(size)
            stack.enter_context(served.handed_over(path, region.address, size))
            addresses.append(region.address)
            stack.callback(region.close)
        served.criu_rig.until(lambda: client.ask("GET", "/v1/server")["clients"] == storms + 1, "handoffs")
        yield addresses[0], addresses[1:]


def fairness_rows(*, quick: bool) -> Iterator[Row]:
    """One quiet client, beside two storms of faults that are filled besides."""
    size, touches = (64 if quick else 512) * MIB, 50 if quick else 500
    for name, title, remote in (("fair", "of a file", False), ("fair-http", "by HTTP, 2 ms away", True)):
        yield Row(
            name,
            f"a fault of a quiet client beside two storms, 99th percentile, {title}",
            "us",
            {
                name: partial(quiet, size, touches, storms, remote=remote)
                for name, storms in (("aiouffd", 2), ("alone", 0))
            },
            (Bar("alone", 2.0),),
            setup="aiouffd serve --control",
        )
