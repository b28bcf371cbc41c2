"""`engine.one_copy`, by a real server: clients that map one file privately have one copy of what they read."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import mmap
import os
import random
from pathlib import Path

import pytest
from pattern import PAGE, content, peek, word
from scenario import eventually, play
from served import HUGE, MIB, Servers, end_server, free_port, hand_over, metric, on_the_web

import aiouffd
from aiouffd.cli import main
from aiouffd.engine.one_copy import OneCopy
from aiouffd.kernel import libc
from aiouffd.kernel.memory import address_of
from examples import microvm

SIZE = 16 * MIB
PAGES = SIZE // PAGE
FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


class Clone:
    """A client that maps what the server sends."""

    def __init__(self, path: str) -> None:
        self.connection = microvm.connect(path)
        self.memory, self.page = microvm.map_one_copy(self.connection)
        self.address = address_of(self.memory)
        place = self.address, len(self.memory)
        self.uffd = microvm.hand_over(self.connection, place, self.page, one_copy=True)

    def right(self, pages: range | list[int]) -> bool:
        """Tell whether these pages are those of the source."""
        return all(peek(self.address + page * PAGE) == word(page) for page in pages)


def mapped() -> int:
    """Return the bytes of files in memory that this process maps, each page by the share that one mapping has."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Shmem"))


def clones(directory: str, source: str) -> None:
    """Scenario: many; all but the holder are killed in the middle; then another server takes over."""
    port = free_port()
    servers = Servers(directory, source, "--one-copy", "small", "--recent", 0, "--metrics", port)
    servers.start("first")
    path = servers.socket
    many = [Clone(path) for _ in range(20)]
    order = random.Random(5).sample(range(PAGES), PAGES)
    assert all(clone.right(order[n : PAGES // 8 : 20]) for n, clone in enumerate(many))
    assert many[0].right(order[: PAGES // 8])
    assert metric(port, "aiouffd_fetched_bytes_total") <= SIZE
    written, emptied = many[3], many[4]
    _libc.memset(written.address + 7 * PAGE, 255, 8)
    libc.madvise(emptied.address, 2 * PAGE, mmap.MADV_DONTNEED)
    servers.lose()
    servers.start("second")
    expected = content(0, SIZE)
    for clone in many[2:7]:
        assert not _libc.memcmp(clone.address + 8 * PAGE, expected[8 * PAGE :], SIZE - 8 * PAGE)
        assert clone.right([0, 1]) or clone is emptied
        assert clone.right([7]) or clone is written
    assert peek(written.address + 7 * PAGE) == b"\xff" * 8
    assert peek(emptied.address) == peek(emptied.address + PAGE) == bytes(8)
    assert 0.99 * SIZE <= mapped() <= 1.2 * SIZE, mapped()
    plain = hand_over(path, MIB)[0]  # of others the memory is their own; this one has closed the connection already
    assert plain[:MIB] == b"".join(word(page) * (PAGE // 8) for page in range(MIB // PAGE))
    servers.start("third", "--takeover")
    fresh = Clone(path)  # a new file
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        with microvm.MicroVM((fresh.address, SIZE)) as vm:
            assert vm.run() == sum((page + 1) & 255 for page in range(PAGES))
    assert fresh.right([3, 4])
    with aiouffd.Monitor(aiouffd.Region(MIB), engine=aiouffd.ServedBy(path)) as monitor:
        assert monitor.region[9 * PAGE : 9 * PAGE + 8] == word(9)
    print(json.dumps(servers.pids))


def test_clones_have_one_copy(image: Path, tmp_path: Path) -> None:
    """A write, and what was given back, are a clone's own; what was killed in between costs no byte."""
    with on_the_web(image) as url:
        end_server(play(clones, str(tmp_path), url)[0])


def counted(name: str) -> dict[str, int]:
    """Return the counts of a session."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(["ctl", "show", name]) == 0
    counts: dict[str, int] = json.loads(told.getvalue())["statistics"]
    return counts


def huge_clones(directory: str, image: str) -> None:
    """Scenario: pages of 2 MiB, with readahead: machines with memory of their own, one of which replays; and clones."""
    servers = Servers(directory, "--control", f"{directory}/control", socket="")
    servers.start("first")
    os.environ["AIOUFFD_CONTROL"] = f"{directory}/control"
    pages = (5, HUGE // PAGE + 5, 2 * HUGE // PAGE + 1)
    for option in ("--record", "--replay"):
        path = f"{directory}/vm{option}"
        assert main(["ctl", "create", f"vm{option}", image, "--socket", path, option, f"{directory}/trace"]) == 0
        region = aiouffd.Region(3 * HUGE, page_size=HUGE)
        with microvm.connect(path) as connection:
            uffd = microvm.hand_over(connection, (region.address, len(region)), HUGE)
            if option == "--replay":
                eventually(lambda: counted("vm--replay").get("pages_replay"), expected=2)
            assert all(peek(region.address + page * PAGE) == word(page) for page in pages[1:])
            assert main(["ctl", "prefetch", f"vm{option}", "--length", "2M"]) == 0
            assert counted(f"vm{option}")["pages_prefetch"] == 1
            assert main(["ctl", "complete", f"vm{option}"]) == main(["ctl", "delete", f"vm{option}"]) == 0
        assert peek(region.address) == word(0)
        uffd.close()
        region.close()
    path = f"{directory}/clones"
    assert main(["ctl", "create", "clones", image, "--socket", path, "--one-copy", "huge", "--readahead", "0"]) == 0
    one, other = Clone(path), Clone(path)
    assert one.right(list(pages))
    free = int(FREE.read_text())
    assert other.right(list(pages))
    assert int(FREE.read_text()) == free, "the other one has pages of its own"
    _libc.memset(one.address, 9, 8)
    assert int(FREE.read_text()) == free - 1
    assert other.right([0])
    print(json.dumps(servers.pids))


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages(image: Path, tmp_path: Path) -> None:
    """One huge page for all clones, and another one for who writes; readahead, prefetch, recording and replay work."""
    end_server(play(huge_clones, str(tmp_path), str(image))[0])


def test_what_the_file_has(caplog: pytest.LogCaptureFixture) -> None:
    """A page without a note is written, one with a note is not; zeros are known; a bad source is an error."""
    fds = OneCopy.create(4 * PAGE - 5, PAGE)
    with fds[0], fds[1]:
        assert os.fstat(fds[1].fileno()).st_size == 4 * PAGE
        assert os.fstat(fds[1].fileno()).st_mode & 0o777 == 0o400
        one = OneCopy.of([fd.fileno() for fd in fds], PAGE)
        data = bytearray(b"a" * PAGE + b"b" * PAGE)
        assert one.put(PAGE, address_of(data), 2 * PAGE) == 0
        one.put_zeros(3 * PAGE, PAGE)
        again = OneCopy.of([fd.fileno() for fd in fds], PAGE)  # as a successor has it
        assert [again.has(page * PAGE) for page in range(4)] == [False, True, True, False]
        assert again.split("data", PAGE, 3 * PAGE) == ("data", 2 * PAGE)
        assert again.split("data", 3 * PAGE, PAGE) == ("zeros", PAGE)
        data[:] = b"c" * PAGE + b"d" * PAGE
        assert again.put(0, address_of(data), 2 * PAGE) == 0
        assert os.pread(fds[1].fileno(), 3 * PAGE, 0) == b"c" * PAGE + b"a" * PAGE + b"b" * PAGE
        other = OneCopy(*OneCopy.create(PAGE, PAGE), PAGE)
        assert other.put(0, 0, PAGE) == errno.EFAULT
        assert not other.has(0)
        one.no_room()
        one.no_room()
        assert caplog.text.count("there is no room") == 1
