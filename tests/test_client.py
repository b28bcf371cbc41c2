"""`pager.client`: what its thread and its callers do at the same time."""

from __future__ import annotations

import socket
import sys
import threading

from aiouffd.pager.client.client import PagerClient
from aiouffd.pager.client.orphan import Orphan
from aiouffd.pager.process.journal import Journal


def test_requests_while_others_take_over() -> None:
    """The pager is not given up because somebody asks for something just then."""
    client = PagerClient(on_error=lambda *_: None)
    client._journal = Journal.create()
    client._held = True
    for _ in range(10_000):
        client.request("prefetch", offset=0, length=0)
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            client._held = True
            client.request("prefetch", offset=0, length=0)
            with client._lock:
                client._pending.pop(next(iter(client._pending)))

    thread = threading.Thread(target=ask)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(100):
            ours, theirs = socket.socketpair()
            theirs.close()
            client._orphans = [Orphan(ours, client._journal, -1)]
            client._open_from_journal()
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
        client.stop()
