"""The engine in a pager, as a Monitor uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from pattern import PAGE, Pattern, Slow, content
from scenario import ended, play

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.engine.options import Options, Service
from aiouffd.kernel.abi import RegisterMode
from aiouffd.monitor.engines.protocol import Assignment

SIZE = 64 * PAGE


class Rig:
    """A registered region, and an engine that serves it."""

    def __init__(self, source: Any) -> None:
        choice = aiouffd.Pager()
        self.region = aiouffd.Region(SIZE)
        self.uffd = aiouffd.Userfaultfd(choice.features)
        self.uffd.register(self.region.address, SIZE, RegisterMode.MISSING)
        self.errors: list[BaseException] = []
        self.lost = threading.Event()
        self.engine = choice.make(None)
        assignment = Assignment(
            uffd=self.uffd,
            service=Service(source),
            mapping=Mapping(self.region.address, self.region.address + SIZE, 0),
            page_size=PAGE,
            options=Options(readahead=0),
            can_poison=True,
            on_error=self.errors.append,
            on_lost=self.lost.set,
        )
        try:
            self.engine.start(assignment)
        except BaseException:
            self.uffd.close()
            raise

    def leave(self) -> list[str]:
        """Leave, and return what was done in which order."""
        done = []

        def settle() -> None:
            done.append("settled")
            done.append("served" if self.region[SIZE - 1] == content(SIZE - 1, 1)[0] else "not served")
            self.uffd.unregister(self.region.address, SIZE)

        pids = self.engine.pids
        self.engine.leave(settle, sigbus=False)
        assert all(ended(pid, 10) for pid in pids)
        return done


def a_life() -> None:
    """Scenario: faults, a prefetch, the counters, the end."""
    rig = Rig(Pattern(SIZE))
    assert rig.region[3 * PAGE] == content(3 * PAGE, 1)[0]
    rig.engine.prefetch([(8 * PAGE, 4 * PAGE)]).result(60)
    counted = rig.engine.statistics()
    assert (counted.pages_fault, counted.pages_prefetch) == (1, 4)
    keeper, worker = rig.engine.pids
    assert keeper != worker
    assert os.getpid() not in (keeper, worker)
    rig.engine.check_may_wait()
    assert rig.engine.layout is None
    # The memory is served until it is settled: a touch that nobody answers would stop the thread that leaves.
    assert rig.leave() == ["settled", "served"]
    assert not rig.errors
    assert not rig.lost.is_set()


def test_a_life() -> None:
    """See the scenario."""
    play(a_life)


def canceled() -> None:
    """Scenario: the future of a prefetch is canceled; the engine serves on."""
    rig = Rig(Slow(SIZE, 0.2))
    future = rig.engine.prefetch([(0, SIZE)])
    future.cancel()
    with pytest.raises(CancelledError):
        future.result(60)
    rig.engine.prefetch([(PAGE, PAGE)]).result(60)
    assert rig.region[PAGE] == content(PAGE, 1)[0]
    assert rig.leave() == ["settled", "served"]


def test_a_canceled_prefetch_costs_nobody_anything() -> None:
    """See the scenario."""
    play(canceled)


def refused() -> None:
    """Scenario: after `refuse` a prefetch brings nothing, and a missing page is poisoned."""
    rig = Rig(Pattern(SIZE))
    rig.engine.refuse()
    with pytest.raises(aiouffd.UffdError):
        rig.engine.prefetch([(0, PAGE)]).result(60)
    read, write = os.pipe()
    with pytest.raises(OSError, match="Bad address"):
        os.write(write, memoryview(rig.region)[PAGE : 2 * PAGE])
    os.close(read)
    os.close(write)
    rig.engine.leave(lambda: rig.uffd.unregister(rig.region.address, SIZE), sigbus=True)


def test_refuse() -> None:
    """See the scenario."""
    play(refused)


def cannot_travel() -> None:
    """Scenario: what should serve cannot be sent; no process is left."""

    class Stubborn(Pattern):
        def __reduce__(self) -> Any:
            raise ValueError("not me")

    with pytest.raises(aiouffd.PagerStartError, match="not me"):
        Rig(Stubborn(SIZE))
    assert not [path for path in Path("/proc").iterdir() if path.name.isdigit() and parent(path) == os.getpid()]


def parent(process: Path) -> int:
    """Return a process's parent; 0 if it has ended meanwhile."""
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_what_cannot_travel_leaves_nothing_behind() -> None:
    """See the scenario."""
    play(cannot_travel)


PLAIN = """
import os, sys, aiouffd
with aiouffd.Pager() as pager:
    os.chroot(sys.argv[1])
    region = aiouffd.Region(1 << 20)
    with aiouffd.Monitor(region, aiouffd.BufferSource(b"abc"), engine=pager) as monitor:
        print(region[0], region[4096], monitor.statistics().pages_fault > 0, monitor)
"""
ON_A_LOOP = """
import asyncio, os, sys, aiouffd
async def main(engine):
    os.chroot(sys.argv[1])
    region = aiouffd.Region(1 << 20)
    async with aiouffd.Monitor(region, aiouffd.BufferSource(b"abc"), engine=engine) as monitor:
        await monitor.prefetch(0, 4097)
        print(region[0], region[4096], monitor.statistics().pages_prefetch > 0, monitor)
with aiouffd.Pager() as pager:
    asyncio.run(main(ENGINE))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may leave its root directory")
@pytest.mark.parametrize(
    "program",
    [PLAIN, ON_A_LOOP.replace("ENGINE", "pager"), ON_A_LOOP.replace("ENGINE", "aiouffd.InProcess()")],
    ids=["plain", "on a loop", "in this process"],
)
def test_a_monitor_where_no_file_can_be_read_any_more(program: str, tmp_path: Path) -> None:
    """Once its engine is made, a Monitor imports nothing."""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.stdout.startswith("97 0 True <Monitor of"), result.stderr
