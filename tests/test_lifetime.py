"""`lifetime`: what still exists when the interpreter ends is left to the kernel, without a word."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import aiouffd
from aiouffd.lifetime import begun, uninterrupted

OWNERS = {
    "aiouffd.Region(4096, shared=True)": "region",
    "memory.SealedMemory.from_buffer(b'x')": "owned_descriptor",
    "pagemap.Pagemap()": "owned_descriptor",
    "owned_descriptor.OwnedSocket.pair(socket.SOCK_STREAM)": "owned_descriptor",
    "crash_notes.Note(4096, 4096)": "crash_notes",
    "aiouffd.FileSource('/proc/self/exe')": "file",
    "daemon_threads.DaemonThreads(1, 'idle')": "daemon_threads",
    "aiouffd.map('/proc/self/exe')": "map",
}
"""Something of each module that has a finalizer."""


@pytest.mark.parametrize("made", OWNERS)
def test_nothing_is_said_when_the_interpreter_ends(made: str) -> None:
    """What a module that was imported before the package refers to is freed when the package's globals are None."""
    program = f"""if True:
        import os, socket, aiouffd
        from aiouffd.kernel import memory, owned_descriptor, pagemap
        from aiouffd.native import crash_notes
        from aiouffd.sources import daemon_threads
        os.kept = {made}
        print("made")
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("made\n", "")


def test_each_finalizer_is_tried() -> None:
    """A new one needs a line above."""
    sources = Path(aiouffd.__file__).parent.rglob("*.py")
    assert {path.stem for path in sources if "def __del__" in path.read_text()} == set(OWNERS.values())


async def test_a_thread_does_the_work_until_its_end() -> None:
    """With the caller's context; whoever waits for it is canceled only then."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("the caller's")
    assert await begun(variable.get) == "the caller's"
    go_on = threading.Event()
    waiting = asyncio.ensure_future(uninterrupted(go_on.wait))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
