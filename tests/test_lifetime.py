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
    "recording.Early('/proc/self/exe')": "recording",
}
"""Something of each module that has a finalizer."""


@pytest.mark.parametrize("made", OWNERS)
def test_nothing_is_said_when_the_interpreter_ends(made: str) -> None:
    """What a module that was imported before the package refers to is freed when the package's globals are None."""
    program = f"""if True:
        import os, socket, aiouffd
        from aiouffd.kernel import memory, owned_descriptor, pagemap
        from aiouffd.monitor import recording
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
    for times in (1, 3):
        done: list[str] = []
        go_on, undo = threading.Event(), threading.Event()

        def work(go_on: threading.Event = go_on, done: list[str] = done) -> None:
            done.append("done" if go_on.wait(60) else "hung")

        def undone(undo: threading.Event = undo, done: list[str] = done) -> None:
            done.append("undone" if undo.wait(60) else "hung")

        waiting = asyncio.ensure_future(uninterrupted(work, undone))
        for event in (go_on, undo):
            for _ in range(times):
                await asyncio.sleep(0.01)
                waiting.cancel()
            await asyncio.sleep(0.01)
            assert not waiting.done()
            event.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert done == ["done", "undone"]


async def test_what_fails_is_not_undone() -> None:
    """Its error is raised, also where it was canceled; and that of what would undo it."""
    go_on = threading.Event()

    def fail() -> None:
        go_on.wait(60)
        raise OSError("it fails")

    waiting = asyncio.ensure_future(uninterrupted(fail, lambda: pytest.fail("it is undone")))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(OSError, match="it fails"):
        await waiting
