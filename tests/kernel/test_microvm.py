"""examples/microvm.py: a real guest whose memory is present, or served by hand, or served by a Monitor."""

from __future__ import annotations

import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pattern import PAGE, Pattern, Slow
from scenario import next_error, play

import aiouffd
from aiouffd import Feature, LayoutChangingError, PageFault, RegisterMode, Remove, Userfaultfd
from aiouffd.ranges import align_down

if TYPE_CHECKING:
    from examples.microvm import MicroVM

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "microvm.py"
HUGE = 2 << 20
MIB = 1 << 20


@pytest.fixture(autouse=True)
def kvm() -> None:
    """Every test here runs a guest."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is missing, or not for this user")


def guest(region: aiouffd.Region) -> MicroVM:
    """Return a VM over a region."""
    from examples.microvm import MicroVM

    return MicroVM((region.address, region.mapped_length), region.page_size)


def expected(pages: range) -> int:
    """Return what the guest makes of these pages of the pattern: page n consists of words n + 1."""
    return sum((page + 1) & 255 for page in pages)


# Present memory


def sums_what_is_present() -> None:
    """Scenario."""
    size = 8 * MIB
    region = aiouffd.Region(size)
    region[:] = random.Random(7).randbytes(size)
    with guest(region) as vm:
        assert vm.memory == (region.address, size)
        first = np.frombuffer(region, np.uint8)[::PAGE]
        assert vm.run() == vm.run() == int(first.sum())
        assert vm.run(PAGE, 3 * PAGE) == int(first[1:4].sum())
        region[5 * PAGE] ^= 255  # what is written between two runs is seen by the second
        assert vm.run() == int(first.sum())
        del first


def test_present_memory_is_summed_right() -> None:
    """All of it or a part, again and again, what was written since included: as numpy does."""
    play(sums_what_is_present)


def reaches_beyond_a_page_directory() -> None:
    """Scenario."""
    gib = 1 << 30
    region = aiouffd.Region(2 * gib + HUGE)
    for edge in (gib, 2 * gib):
        region[edge - PAGE] = 3
        region[edge] = 4
    region[2 * gib + HUGE - PAGE] = 5
    with guest(region) as vm:
        assert vm.run(gib - PAGE, 2 * PAGE) == 7
        assert vm.run(2 * gib - PAGE, HUGE + PAGE) == 12


def test_a_guest_of_more_than_a_gibibyte() -> None:
    """Its page tables reach the last page of an odd length."""
    play(reaches_beyond_a_page_directory)


# Served by hand


class Pager:
    """A pager as small as can be, for one VM: takes the handoff, then answers from a pattern page by page.

    Attributes:
        mapping: the one element of the array that came.
        faulted: the offsets that were asked for, in order.
        removed: the offsets [start, end) that the VM gave back; they are zeros since.
    """

    def __init__(self, path: Path, poisoned: int | None = None) -> None:
        self.path = path
        self.poisoned = poisoned
        self.mapping: dict[str, int] = {}
        self.faulted: list[int] = []
        self.removed: list[tuple[int, int]] = []
        self.failure: BaseException | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(30)
        self._thread = threading.Thread(target=self._main)

    def __enter__(self) -> Pager:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.mapping:  # the VM has ended without a word: do not wait for one
            with socket.socket(socket.AF_UNIX) as nobody:
                nobody.connect(str(self.path))
        self._thread.join(40)
        self._listener.close()
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure

    def _main(self) -> None:
        try:
            connection, _ = self._listener.accept()
            connection.settimeout(30)
            data, descriptors, _, _ = socket.recv_fds(connection, 4096, 4)
            (self.mapping,) = json.loads(data)  # all of it came in one message
            (fd,) = descriptors
            with connection, Userfaultfd.from_fd(fd, Feature.EVENT_REMOVE) as uffd:
                self._serve(connection, uffd)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits for this one
            self.failure = error

    def _serve(self, connection: socket.socket, uffd: Userfaultfd) -> None:
        poller = select.poll()
        poller.register(uffd.fileno(), select.POLLIN)
        poller.register(connection, select.POLLIN)
        waiting: list[int] = []
        while ready := dict(poller.poll(1 if waiting else 30_000)) or waiting:
            for event in uffd.read():
                if isinstance(event, Remove):
                    base = self.mapping["base_host_virt_addr"]
                    self.removed.append((event.start - base, event.end - base))
                else:
                    assert isinstance(event, PageFault)
                    waiting.append(event.address)
            try:
                while waiting:
                    self._answer(uffd, waiting[-1])
                    waiting.pop()
            except LayoutChangingError:
                continue  # the one that gave pages back has not run again yet
            if not waiting and isinstance(ready, dict) and connection.fileno() in ready:
                assert connection.recv(1) == b""  # the VM has nothing more to say, but that it ends
                return
        raise AssertionError("neither a fault nor the VM's end in half a minute")

    def _answer(self, uffd: Userfaultfd, address: int) -> None:
        size, base = self.mapping["page_size"], self.mapping["base_host_virt_addr"]
        page = align_down(address, size)
        offset = page - base + self.mapping["offset"]
        self.faulted.append(offset)
        if offset == self.poisoned:
            uffd.poison(page, size)
        elif any(start <= offset < end for start, end in self.removed):
            uffd.copy(page, bytes(size))
        else:
            number = (offset // size + 1).to_bytes(8, "little")
            assert uffd.copy(page, number * (size // 8)) == size


def run_example(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the example against the pager at `path`, with a deadline."""
    command = [sys.executable, str(EXAMPLE), str(path), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    print(result.stderr)  # shown when the test fails, for whichever reason
    return result


def checksums(result: subprocess.CompletedProcess[str], pages: int) -> list[int]:
    """Return the checksum of each round that the example printed."""
    assert result.returncode == 0, result.stderr
    found = []
    for line in result.stdout.splitlines():
        words = line.replace(",", "").split()
        assert (words[0], words[2], words[3], words[5]) == ("checksum", str(pages), "pages", "seconds")
        assert float(words[4]) > 0
        found.append(int(words[1]))
    return found


def test_the_guests_memory_comes_over_the_handoff(tmp_path: Path) -> None:
    """One message hands over; each page is asked for once; the second round asks for nothing."""
    with Pager(tmp_path / "socket") as pager:
        result = run_example(pager.path, "--memory", "2", "--rounds", "2")
    pages = 2 * MIB // PAGE
    assert checksums(result, pages) == [expected(range(pages))] * 2
    assert set(pager.mapping) == {"base_host_virt_addr", "size", "offset", "page_size"}
    assert (pager.mapping["size"], pager.mapping["offset"], pager.mapping["page_size"]) == (2 * MIB, 0, PAGE)
    assert pager.faulted == list(range(0, 2 * MIB, PAGE))


def test_what_the_balloon_took_is_zeros(tmp_path: Path) -> None:
    """The pager is told of exactly that part, and the guest's sum is that of the rest."""
    with Pager(tmp_path / "socket") as pager:
        result = run_example(pager.path, "--memory", "4", "--balloon", "1")
    pages = 4 * MIB // PAGE
    assert checksums(result, pages) == [expected(range(MIB // PAGE, pages))]
    assert pager.removed == [(0, MIB)]


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("balloon", [0, 2])
def test_huge_pages_come_whole(tmp_path: Path, balloon: int) -> None:
    """Pages of 2 MiB: one fault each, and each is summed once; given back, they are zeros too."""
    options = ["--memory", "8", "--page-size", str(HUGE), "--balloon", str(balloon)]
    with Pager(tmp_path / "socket") as pager:
        result = run_example(pager.path, *options)
    assert checksums(result, 4) == [expected(range(balloon // 2, 4))]
    assert pager.mapping["page_size"] == HUGE
    assert pager.faulted == list(range(0, 8 * MIB, HUGE))


def test_a_poisoned_page_is_an_error(tmp_path: Path) -> None:
    """Exit status 1 and the page's offset; neither a hang nor a sum."""
    with Pager(tmp_path / "socket", poisoned=17 * PAGE) as pager:
        result = run_example(pager.path, "--memory", "1")
    assert result.returncode == 1
    assert "offset 0x11000 of the guest's memory cannot be had" in result.stderr
    assert "checksum" not in result.stdout
    assert pager.faulted[-1] == 17 * PAGE


@pytest.mark.parametrize("options", [("--memory", "0"), ("--balloon", "65"), ("--page-size", "8192")])
def test_wrong_options_are_status_2(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Said before anybody is connected to."""
    result = run_example(tmp_path / "nobody", *options)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def thread_serves_its_own_guest() -> None:
    """Scenario."""
    size = MIB
    region = aiouffd.Region(size)
    with Userfaultfd() as uffd, guest(region) as vm:
        uffd.register(region.address, size, RegisterMode.MISSING)
        done = threading.Event()

        def serve() -> None:
            poller = select.poll()
            poller.register(uffd.fileno(), select.POLLIN)
            while not done.is_set():
                poller.poll(50)
                for event in uffd.read():
                    assert isinstance(event, PageFault)
                    page = align_down(event.address, PAGE)
                    uffd.copy(page, struct.pack("Q", (page - region.address) // PAGE + 1) * (PAGE // 8))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert vm.run() == expected(range(size // PAGE))
        finally:
            done.set()
            thread.join()


def test_a_thread_of_the_same_process_can_serve_the_guest() -> None:
    """While the guest waits for a page, Python runs: KVM_RUN does not hold the GIL."""
    play(thread_serves_its_own_guest)


# Served by a Monitor


def monitor_serves_a_guest(kind: str, page_size: int) -> None:
    """Scenario."""
    size = 8 * MIB if page_size == HUGE else 64 * MIB
    source: Any = {"at hand": Pattern, "far away": Slow}[kind](size)
    region = aiouffd.Region(size, page_size=page_size)
    with aiouffd.Monitor(region, source) as monitor, guest(region) as vm:
        want = sum((page + 1) & 255 for page in range(0, size // PAGE, page_size // PAGE))
        assert vm.run() == want
        faults = monitor.statistics().faults
        # A guest that moves in order is recognised; a window is never smaller than a page.
        assert 0 < faults <= (size // HUGE if page_size == HUGE else size // PAGE // 4)
        assert vm.run() == want
        assert monitor.statistics().faults == faults
        region.madvise(4, 0, size // 2)  # MADV_DONTNEED
        assert vm.run() == sum((page + 1) & 255 for page in range(size // 2 // PAGE, size // PAGE, page_size // PAGE))
        monitor.check()


@pytest.mark.parametrize("kind", ["at hand", "far away"])
def test_a_monitor_serves_a_guest(kind: str) -> None:
    """64 MiB with defaults: the sum is right, runs are brought at once, and what is dropped is zeros."""
    play(monitor_serves_a_guest, kind, PAGE)


@pytest.mark.usefixtures("huge_pages")
def test_a_monitor_serves_a_guest_of_huge_pages() -> None:
    """The same in pages of 2 MiB."""
    play(monitor_serves_a_guest, "at hand", HUGE)


class Broken(Pattern):
    """Cannot read its tenth page."""

    def read_nowait(self, offset: int, length: int) -> Any:
        """Nothing is at hand."""

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, but for one page."""
        if offset <= 9 * PAGE < offset + length:
            raise aiouffd.SourceError(repr(self), offset, length, "a bad sector")
        return await super().read(offset, length)


def source_fails_the_guest() -> None:
    """Scenario."""
    region = aiouffd.Region(MIB)
    from examples.microvm import GuestError

    with aiouffd.Monitor(region, Broken(MIB)) as monitor, guest(region) as vm:
        with pytest.raises(GuestError, match="offset 0x9000 of the guest's memory cannot be had"):
            vm.run()
        with pytest.raises(aiouffd.SourceError, match="a bad sector"):
            next_error(monitor)
        with pytest.raises(OSError, match="Bad file descriptor"):
            vm.run()  # it is destroyed: half an instruction of it is pending
        with guest(region) as other:
            assert other.run(10 * PAGE) == expected(range(10, MIB // PAGE))


def test_a_source_that_fails_is_an_error_of_the_guest() -> None:
    """GuestError for that page, the source's error at the Monitor; a new VM runs on the other pages."""
    play(source_fails_the_guest)
