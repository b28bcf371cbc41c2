"""A program that closes all descriptors that it has, as daemons do, and opens files of its own, which get the numbers.

Nothing of ours reads, writes or closes those; nobody waits for ever; and no missing page is zeros.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Pattern, content, peek, word
from processes import has_ended
from scenario import eventually, next_error, play
from served import Serve

import aiouffd
from aiouffd.monitor.engines import pager as engines

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 64 * PAGE
THEIRS = b"theirs"


class Theirs:
    """The files of a program that has closed all that it had, of two kinds: a number is as likely to be of each."""

    def __init__(self) -> None:
        os.closerange(3, 200)
        self.memfds: list[int] = []
        self.sockets: list[socket.socket] = []
        for _ in range(30):
            self.memfds.append(os.memfd_create("theirs"))
            os.write(self.memfds[-1], THEIRS)
            self.sockets += socket.socketpair()
        for each in self.sockets:
            each.send(THEIRS)
            each.setblocking(True)

    def check(self) -> None:
        """See that each is there still, and has what it had."""
        gc.collect()
        for memfd in self.memfds:
            assert os.pread(memfd, 100, 0) == THEIRS
            assert os.lseek(memfd, 0, os.SEEK_CUR) == len(THEIRS)
        for each in self.sockets:
            assert each.getblocking() == os.get_blocking(each.fileno())
            assert each.recv(100) == THEIRS
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.recv(100)


def ends(touch: Callable[[], object]) -> int:
    """Return how a forked child ends that touches something: its status, or the negated signal."""
    child = os.fork()
    if not child:
        touch()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def closed_inside(at_once: bool, on_exit: Any) -> None:
    """Scenario: inside the block. What is present stays, what is missing is a signal, and the Monitor says why."""
    region = aiouffd.Region(SIZE)
    with contextlib.suppress(aiouffd.PagerError):
        with aiouffd.Monitor(region, Pattern(SIZE), readahead=0, on_exit=on_exit) as monitor:
            assert peek(region.address) == word(0)
            pids = monitor.pids
            theirs = Theirs()
            if not at_once:
                with pytest.raises(aiouffd.PagerError, match="has closed descriptors"):
                    next_error(monitor)
                with pytest.raises(aiouffd.PagerError, match="has closed descriptors"):
                    monitor.prefetch_sync(0, SIZE)
                assert monitor.statistics().pages_fault == 1
        assert on_exit != "populate"
    assert not any(map(has_ended, pids))  # who waits for a page since before is served
    assert peek(region.address) == word(0)
    assert ends(lambda: region[5 * PAGE]) == -signal.SIGSEGV
    theirs.check()
    with aiouffd.Monitor(aiouffd.Region(SIZE), Pattern(SIZE)) as monitor:
        assert monitor.region[5 * PAGE] == 6


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("on_exit", ["sigbus", "populate", "zeros"])
def test_closed_inside_the_block(at_once: bool, on_exit: str) -> None:
    """It is noticed within a second, or where the block is left."""
    play(closed_inside, at_once, on_exit, measured=False)


def closed_beside_a_server(path: str) -> None:
    """Scenario: a server serves the region."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        assert region[0] == 1
        theirs = Theirs()
        with pytest.raises(aiouffd.PagerError, match="has closed descriptors"):
            next_error(monitor)
    assert ends(lambda: region[SIZE - 1]) == -signal.SIGSEGV
    theirs.check()


def test_closed_beside_a_server(tmp_path: Path) -> None:
    """A connection to a server is a descriptor, too."""
    path = tmp_path / "data"
    path.write_bytes(content(0, SIZE))
    with Serve(tmp_path, path, "--readahead", "0") as serve:
        play(closed_beside_a_server, str(serve.path), measured=False)


def closed_while_others_are_there(directory: str) -> None:
    """Scenario: several Monitors of one pager: of a file, of shared memory, and one that records."""
    path = Path(directory, "data")
    path.write_bytes(content(0, SIZE))
    shared = aiouffd.Region(SIZE, shared=True)
    regions = [aiouffd.Region(SIZE), shared, aiouffd.Region(SIZE)]
    with contextlib.ExitStack() as stack:
        monitors = [
            stack.enter_context(aiouffd.Monitor(regions[0], aiouffd.FileSource(path))),
            stack.enter_context(aiouffd.Monitor(regions[1], aiouffd.FileSource(path))),
        ]
        recording = aiouffd.Monitor(regions[2], aiouffd.FileSource(path), record=Path(directory, "record"))
        recording.__enter__()
        for region in regions:
            assert region[0] == 1
        theirs = Theirs()
        for monitor in [*monitors, recording]:
            with pytest.raises(aiouffd.PagerError, match="has closed descriptors"):
                next_error(monitor)
        with pytest.raises(OSError, match="recording"):
            recording.__exit__(None, None, None)
    with pytest.raises(aiouffd.ClosedError):
        shared.resize(2 * SIZE)
    for region in regions:
        assert region[0] == 1
        region.close()
    del region, shared, regions, monitor, monitors, recording
    theirs.check()


def test_several_monitors(tmp_path: Path) -> None:
    """Sources, shared memory and recordings have descriptors of their own."""
    play(closed_while_others_are_there, str(tmp_path), measured=False)


def closed_while_it_lingers() -> None:
    """Scenario: nobody is served. The pager ends, and another serves the next Monitor."""
    engines._shared._linger = 1000.0
    with aiouffd.Monitor(aiouffd.Region(SIZE), aiouffd.BufferSource(content(0, SIZE))) as monitor:
        assert monitor.region[5 * PAGE] == 6
        pids = monitor.pids
    theirs = Theirs()
    eventually(lambda: [pid for pid in pids if Path(f"/proc/{pid}").exists()], [])
    with aiouffd.Monitor(aiouffd.Region(SIZE), aiouffd.BufferSource(content(0, SIZE))) as monitor:
        assert monitor.region[5 * PAGE] == 6
        assert monitor.pids != pids
    theirs.check()


def closed_after_it_was_left() -> None:
    """Scenario: nothing is there any more but what the process keeps for the next Monitor."""
    with aiouffd.Monitor(aiouffd.Region(SIZE), Pattern(SIZE)) as monitor:
        assert monitor.region[5 * PAGE] == 6
    theirs = Theirs()
    with aiouffd.Monitor(aiouffd.Region(SIZE), Pattern(SIZE)) as monitor:
        assert monitor.region[5 * PAGE] == 6
    theirs.check()


def closed_in_a_child() -> None:
    """Scenario: the child makes itself a daemon, and leaves the blocks that its parent has entered."""
    region = aiouffd.Region(SIZE, shared=True)
    with aiouffd.Monitor(region, aiouffd.BufferSource(content(0, SIZE)), fork="serve", readahead=0) as monitor:
        assert region[0] == 1
        child = os.fork()
        if not child:
            theirs = Theirs()
            assert region[7 * PAGE] == 8
    if not child:
        del monitor, region
        theirs.check()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("scenario", [closed_while_it_lingers, closed_after_it_was_left, closed_in_a_child])
def test_closed_outside_of_the_block(scenario: Callable[[], None]) -> None:
    """See the scenarios."""
    play(scenario, measured=False)
