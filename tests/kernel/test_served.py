"""`pager.process.served`: what a worker serves, when a source does not answer or the journal is full."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fuse
import pytest
from pattern import PAGE, Pattern, content, peek, word
from scenario import TESTS, ended, eventually, play, replaced
from served import hand_over

import aiouffd
from aiouffd.engine.mappings import ZEROS
from aiouffd.kernel import libc
from aiouffd.pager.client.interpreter import SWITCH
from aiouffd.pager.process.replay import survey
from aiouffd.server.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 64 * PAGE
_libc = ctypes.CDLL(None, use_errno=True)
needs_fuse = pytest.mark.skipif(fuse.possible() is not None, reason=str(fuse.possible()))


def leaves_while_a_read_hangs(directory: str) -> None:
    """Scenario: the file system of the source has stopped answering, and a thread waits for a page of it."""
    with fuse.mounted(directory, content(0, SIZE)) as (path, server):
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, aiouffd.FileSource(path), readahead=0, on_exit="zeros") as monitor:
            assert peek(region.address) == word(0)
            fuse.silence(server)
            thread = threading.Thread(target=peek, args=(region.address + 9 * PAGE,))
            thread.start()
            eventually(lambda: monitor.statistics().in_flight, 1)
            pids = monitor.pids
        thread.join()
    assert all(ended(pid, 10.0) for pid in pids)  # the file system is gone, which the processes may have waited for
    os._exit(0)


@needs_fuse
def test_leaving_while_a_read_hangs(tmp_path: Path) -> None:
    """It does not wait for the read, and nothing is said of a loop that does not turn."""
    _, errors = play(leaves_while_a_read_hangs, str(tmp_path))
    assert errors == ""


class FailsOnce(Pattern):
    """Says where it lies when it is asked, but for once, if there is a file."""

    def __init__(self, path: str) -> None:
        super().__init__(SIZE)
        self.path = path

    def locate(self, _offset: int, _length: int) -> int | None:
        """Say nowhere."""
        return None

    def memory(self) -> None:
        """Fail if there is the file, and remove it."""
        if os.path.exists(self.path):  # noqa: PTH110
            os.unlink(self.path)  # noqa: PTH108
            raise RuntimeError(self.path)


def cannot_take_over(path: str) -> None:
    """Scenario: the first worker behind one that was killed fails to serve what that has served."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, FailsOnce(path), engine=aiouffd.Pager(), on_exit="zeros") as monitor:
        assert peek(region.address) == word(0)
        Path(path).touch()
        os.kill(monitor.pids[1], signal.SIGKILL)
        monitor.prefetch_sync(0, 8 * PAGE)
        assert peek(region.address + 9 * PAGE) == word(9)
        assert not Path(path).exists()


def test_a_worker_that_cannot_take_over_is_replaced(tmp_path: Path) -> None:
    """It would leave threads and requests waiting for ever; the next one may do better."""
    assert "could not be taken over" in play(cannot_take_over, str(tmp_path / "file"))[1]


def serve_both(
    directory: str, near: str, path: str, clients: Callable[[Server, int], None], source_of: Callable[[int, str], str]
) -> None:
    """Run clients of two sources, "near", and "far": that has a file system of its own, whose process they are told.

    Args:
        directory: where that is mounted.
        near: the path of the other source.
        path: of the server's socket.
        clients: run in a thread.
        source_of: returns the source of a client, of whom it gets the number and the name.
    """

    async def main() -> None:
        with fuse.mounted(directory, content(0, SIZE), flushes=False) as (far, silent):
            # The kernel hears that there is no FLUSH: a process that is started closes what it has inherited.
            os.close(os.open(far, os.O_RDONLY))
            sources = {"near": aiouffd.FileSource(near), "far": aiouffd.FileSource(far)}
            async with Server(lambda _, *of: sources[source_of(*of)], path, readahead=0) as server:
                await asyncio.to_thread(clients, server, silent)

    asyncio.run(main())


def output_of(scenario: Callable[[str, str, str], None], directory: Path) -> str:
    """Play a scenario that calls `serve_both`; return what it has printed."""
    near, far = directory / "near", directory / "far"
    near.write_bytes(content(0, SIZE))
    far.mkdir()
    return play(scenario, str(far), str(near), str(directory / "socket"), measured=False)[0]


def one_file_system_is_silent(directory: str, near: str, path: str) -> None:
    """Scenario: the worker is killed while the file system of one of two sources does not answer."""

    def clients(server: Server, silent: int) -> None:
        far_region, near_region = aiouffd.Region(SIZE), aiouffd.Region(SIZE)
        near_monitor = aiouffd.Monitor(near_region, engine=aiouffd.ServedBy(path, source="near"))
        far_monitor = aiouffd.Monitor(far_region, engine=aiouffd.ServedBy(path, source="far"), on_exit="zeros")
        with near_monitor, far_monitor:
            assert peek(far_region.address) == peek(near_region.address) == word(0)
            fuse.silence(silent)
            thread = threading.Thread(target=peek, args=(far_region.address + 9 * PAGE,), daemon=True)
            thread.start()
            for page in range(1, 4):
                worker = server.pids[1]
                os.kill(worker, signal.SIGKILL)
                assert peek(near_region.address + page * PAGE) == word(page)
                near_monitor.prefetch_sync(page * PAGE, PAGE, 10.0)
                eventually(lambda: server.pids[1] != worker, expected=True)  # noqa: B023 - called at once
            assert thread.is_alive()
            print("near was served", flush=True)
            os.kill(silent, signal.SIGKILL)  # else the pager would outlive this process, and wait for the file system
            os._exit(0)

    serve_both(directory, near, path, clients, lambda _, name: name)


@needs_fuse
def test_a_successor_opens_each_source_by_itself(tmp_path: Path) -> None:
    """The clients of the other source are served at once."""
    assert output_of(one_file_system_is_silent, tmp_path) == "near was served\n"


def touched(address: int, expected: bytes) -> None:
    """Touch a page in a thread, and have it come within the time that a test has, and not a source that hangs."""
    found: list[bytes] = []
    threading.Thread(target=lambda: found.append(peek(address)), daemon=True).start()
    eventually(lambda: found, expected=[expected], seconds=20.0)


def one_source_of_a_file_is_silent(directory: str, near: str, path: str) -> None:
    """Scenario: the same, and two clients map one memfd, each with a source of its own."""

    def clients(server: Server, silent: int) -> None:
        ours, *_kept = hand_over(path, SIZE, shared=True)
        assert peek(ours.address) == word(0)
        theirs, *_kept_too = hand_over(path, of=ours)
        assert peek(theirs.address + PAGE) == word(1)
        fuse.silence(silent)
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(peek(theirs.address + 9 * PAGE)), daemon=True)
        thread.start()
        for page in range(2, 5):
            worker = server.pids[1]
            os.kill(worker, signal.SIGKILL)
            assert peek(ours.address + page * PAGE) == word(page)
            libc.madvise(ours.address + (20 + page) * PAGE, PAGE, mmap.MADV_REMOVE)  # of what is missing
            assert peek(ours.address + (30 + page) * PAGE) == word(30 + page)
            eventually(lambda: server.pids[1] != worker, expected=True)  # noqa: B023 - called at once
        pids = server.pids
        for pid in pids:  # another pager is asked for both
            os.kill(pid, signal.SIGKILL)
        touched(ours.address + 5 * PAGE, word(5))
        libc.madvise(ours.address + 25 * PAGE, PAGE, mmap.MADV_REMOVE)
        replaced(server, *pids)
        os.kill(worker := server.pids[1], signal.SIGKILL)  # its successor knows what was emptied
        eventually(lambda: server.pids[1] != worker, expected=True)
        touched(ours.address + 6 * PAGE, word(6))
        assert thread.is_alive()
        print("ours was served", flush=True)
        os.kill(silent, signal.SIGCONT)
        thread.join()
        assert found == [word(9)]
        pages = {page: peek(theirs.address + page * PAGE) for page in range(20, 28)}
        assert pages == {page: bytes(8) if 22 <= page < 26 else word(page) for page in pages}

    serve_both(directory, near, path, clients, lambda number, _: "near" if number == 1 else "far")


@needs_fuse
def test_a_file_of_memory_of_which_one_source_does_not_answer(tmp_path: Path) -> None:
    """Who maps it, and has another source, is served at once; what he empties meanwhile is zeros for all."""
    assert output_of(one_source_of_a_file_is_silent, tmp_path) == "ours was served\n"


class Costly(Pattern):
    """Cannot be rebuilt in a pager, for want of descriptors."""

    def __reduce__(self) -> Any:
        return no_descriptor, ()


def no_descriptor() -> None:
    """Raise what open(2) raises."""
    raise OSError(errno.EMFILE, "too many")


def test_a_source_that_needs_more_descriptors_than_there_are() -> None:
    """The error names the limit."""
    monitor = aiouffd.Monitor(aiouffd.Region(SIZE), Costly(SIZE))
    with pytest.raises(aiouffd.PagerStartError, match="rebuilt: Too many open files; RLIMIT_NOFILE is"), monitor:
        pass


class OnceOnly(Pattern):
    """Can be rebuilt in a pager once."""

    def __init__(self, size: int, mark: str) -> None:
        super().__init__(size)
        self.mark = mark

    def __reduce__(self) -> Any:
        return once_only, (self.size, self.mark)


def once_only(size: int, mark: str) -> OnceOnly:
    """Rebuild a source, unless that was done before."""
    with open(mark, "x"):  # noqa: PTH123 - FileExistsError the second time
        return OnceOnly(size, mark)


def one_source_cannot_be_opened_again(mark: str, path: str) -> None:
    """Scenario: the worker is killed; one of two sources cannot be rebuilt in its successor."""

    def clients(server: Server) -> None:
        lost_region, kept_region = aiouffd.Region(SIZE), aiouffd.Region(SIZE)
        kept_monitor = aiouffd.Monitor(kept_region, engine=aiouffd.ServedBy(path, source="kept"))
        lost_monitor = aiouffd.Monitor(lost_region, engine=aiouffd.ServedBy(path, source="lost"), on_exit="zeros")
        with kept_monitor, lost_monitor:
            assert peek(lost_region.address) == peek(kept_region.address) == word(0)
            os.kill(server.pids[1], signal.SIGKILL)
            assert peek(kept_region.address + PAGE) == word(1)
            with pytest.raises(aiouffd.SourceError, match="could not be opened again"):
                lost_monitor.prefetch_sync(PAGE, PAGE, 10.0)
            assert server.statistics().restarts == 1
            kept_monitor.check()

    async def main() -> None:
        sources = {"kept": Pattern(SIZE), "lost": OnceOnly(SIZE, mark)}
        async with Server(lambda _, __, name: sources[name], path, readahead=0) as server:
            await asyncio.to_thread(clients, server)

    asyncio.run(main())


def test_a_source_that_cannot_be_opened_again_costs_its_own_clients_only(tmp_path: Path) -> None:
    """The worker does not die of it, and they are told."""
    _, errors = play(one_source_cannot_be_opened_again, str(tmp_path / "mark"), str(tmp_path / "socket"))
    assert "could not be opened again" in errors


SMALL_JOURNAL = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(TESTS.parent)!r})
from aiouffd.pager.process import journal, rewriting
journal._LOG_SIZE = 1 << 19
rewriting._LEAST = 1 << 14
sys.argv = ["aiouffd.pager", *sys.argv[-2:]]
from aiouffd.pager import __main__
sys.exit(__main__.main())
"""


@pytest.fixture
def small_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pagers have a journal for some thousand mappings."""
    wrapper = tmp_path / "python"
    wrapper.write_text(SMALL_JOURNAL)
    wrapper.chmod(0o755)
    monkeypatch.setenv(SWITCH, str(wrapper))


def removes(region: aiouffd.Region, done: list[int]) -> Callable[[], None]:
    """Return a function that gives every other page back, and notes which."""

    def give_back() -> None:
        for page in range(0, len(region) // PAGE, 2):
            # Not by the region's own method: it would wait with the GIL held.
            assert _libc.madvise(ctypes.c_void_p(region.address + page * PAGE), PAGE, mmap.MADV_DONTNEED) == 0
            done.append(page)

    return give_back


def a_journal_is_full() -> None:
    """Scenario: memory is cut into more pieces than the journal has room for."""
    pages = 40_000
    region = aiouffd.Region(pages * PAGE)
    with aiouffd.Monitor(region, aiouffd.ZeroSource(pages * PAGE), readahead=0, on_exit="zeros") as monitor:
        done: list[int] = []
        thread = threading.Thread(target=removes(region, done), daemon=True)
        thread.start()

        async def told() -> None:
            with pytest.raises(aiouffd.PagerError, match="pieces"):
                await asyncio.wait_for(monitor.wait_error(), 60)

        asyncio.run(told())
        seen = -1
        while len(done) != seen:  # what is not read waits, and nothing is lost
            seen = len(done)
            thread.join(0.2)
        assert thread.is_alive()
        assert monitor.statistics().restarts == 0
        state = survey(monitor._engine._client._requests.pair.journal)  # type: ignore[union-attr]
        assert state is not None
        (space,) = state.spaces.values()
        assert all(space.mappings.locate(region.address + page * PAGE)[2] == ZEROS for page in list(done))
    print("left", flush=True)


@pytest.mark.usefixtures("small_journal")
def test_a_journal_that_is_full_is_told() -> None:
    """Nothing is read any more, and the block can be left."""
    output, _ = play(a_journal_is_full, deadline=90)
    assert output == "left\n"
