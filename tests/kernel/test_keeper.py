"""`keeper`: keeps a worker alive that shares its descriptors, and ends with it."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pairs import running
from processes import crash, ended, forked, kill
from scenario import eventually

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.engine.options import Options, Service
from aiouffd.engine.statistics import Counter, Counters
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.pager.client.packing import Pack
from aiouffd.pager.client.tenant import Tenant
from aiouffd.pager.process.journal import Journal, Whose
from aiouffd.pager.process.keeper import _Keeper, _orphaned
from aiouffd.pager.process.state import Meta, SpaceState, State

PAGE = 4096


def parent_of(pid: int) -> int:
    """Return who has started a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descriptors(pid: int) -> dict[str, str]:
    """Return the table of descriptors, as it is while it changes."""
    table: dict[str, str] = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - names only
        with contextlib.suppress(FileNotFoundError):  # closed just now
            table[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")  # noqa: PTH115
    return table


def test_a_worker_that_dies_is_replaced() -> None:
    """By the same keeper, which forks it: another pid, the same connection."""
    with running() as pager:
        keeper, worker = pager.pair.keeper.pid, pager.pair.worker_pid
        assert parent_of(worker) == keeper
        assert kill(worker)
        successor = pager.ready()
        assert successor != worker
        assert parent_of(successor) == keeper
        assert pager.ask("resume", counters=[])["ok"] is None
    assert ended(keeper)
    assert ended(successor)


def test_keeper_and_worker_share_one_table_of_descriptors() -> None:
    """A forked child's descriptor arrives in the worker's, and must outlive the worker."""
    with running() as pager:
        keeper, worker = pager.pair.keeper.pid, pager.pair.worker_pid
        eventually(lambda: descriptors(keeper) == descriptors(worker), expected=True)  # one is open for a moment
        assert any("socket" in name for name in descriptors(keeper).values())


def test_what_a_dead_worker_has_left_is_closed() -> None:
    """Descriptors of which no journal speaks do not pile up."""
    with running() as pager:
        keeper = pager.pair.keeper.pid
        # The worker's, which the clone has made, and for a moment what it has sent that by.
        assert pager.ask("resume", counters=[])["ok"] is None
        eventually(lambda: list(descriptors(keeper).values()).count("anon_inode:[pidfd]"), 1)
        before = len(descriptors(keeper))
        for _ in range(3):
            kill(pager.pair.worker_pid)
            pager.ready()
            # What it has sent its pidfd by is open for a moment.
            eventually(lambda: len(descriptors(keeper)) <= before, expected=True)


def test_successors_add_nothing_to_the_journal() -> None:
    """Else each of them would replay more than the one before it, and the page that waits for it would wait longer."""
    region = aiouffd.Region(16 * PAGE)
    pack = Pack(Service(aiouffd.ZeroSource(16 * PAGE)), Options())
    with aiouffd.Userfaultfd() as uffd, running() as pager:
        uffd.register(region.address, 16 * PAGE, aiouffd.RegisterMode.MISSING)
        tenant = Tenant(pack, uffd, [Mapping(region.address, region.address + 16 * PAGE, 0)], PAGE)
        own = os.pidfd_open(os.getpid())
        what = {"token": tenant.token, "service": pack.record, "space": tenant.record(tenant.mappings)}
        assert pager.ask("open", [own, *pack.fds, *tenant.fds], own=len(tenant.fds), counts=[], **what)["ok"] is None
        os.close(own)
        before = pager.pair.journal.size
        assert before > 0
        for _ in range(3):
            kill(pager.pair.worker_pid)
            pager.ready()
        assert pager.pair.journal.size == before
        assert pager.ask("close", token=tenant.token, poison=False)["ok"] is None
    pack.close()


def test_what_is_opened_again_counts_on() -> None:
    """Where others have counted meanwhile in its slot, too: the next pager is told by `resume`, and counts on."""
    pack = Pack(Service(aiouffd.ZeroSource(PAGE)), Options())
    region, before = aiouffd.Region(PAGE), Counters()
    before.words[Counter.FAULTS] = 5
    with aiouffd.Userfaultfd() as uffd, running() as pager:
        uffd.register(region.address, PAGE, aiouffd.RegisterMode.MISSING)
        tenant = Tenant(pack, uffd, [Mapping(region.address, region.address + PAGE, 0)], PAGE)
        own = os.pidfd_open(os.getpid())
        pager.ask("resume", token=None, counters=[], slots=[(1, before.words.tolist())], files=[])
        what = {"token": tenant.token, "service": {**pack.record, "slot": 1}, "space": tenant.record(tenant.mappings)}
        for counts, faults in (None, 5), ([0] * Counter.FAULTS + [3], 3):
            answer = pager.ask("open", [own, *pack.fds, *tenant.fds], own=len(tenant.fds), counts=counts, **what)
            assert answer["ok"] is None
            assert pager.pair.journal.counters_of(1).words[Counter.FAULTS] == faults
            assert pager.ask("close", token=tenant.token, poison=False)["ok"] is None
        os.close(own)
    pack.close()


def test_a_worker_is_no_orphan_while_somebody_may_wait_for_it() -> None:
    """Whoever has started the pager is gone; a worker that has much to do is not killed, unless all others are, too."""
    ours, theirs = socket.socketpair()
    with ours, aiouffd.Userfaultfd() as uffd:

        def be_client() -> None:
            with aiouffd.Userfaultfd() as its:
                socket.send_fds(theirs, [b"."], [its.fileno()])

        pid = forked(be_client)
        with OwnedDescriptor(os.pidfd_open(pid)) as owner, OwnedDescriptor(socket.recv_fds(ours, 1, 1)[1][0]) as gone:
            os.waitpid(pid, 0)
            for served, orphaned in ([gone, uffd], False), ([gone], True):
                spaces = {each.fileno(): SpaceState(each.fileno(), each.fileno(), PAGE, 0, 1, "t") for each in served}
                journal = Journal.create()
                state = State(Meta(owner=owner.fileno()), {}, spaces)
                journal.change(journal.write_anew(0, state.encode()))
                assert _orphaned(journal) is orphaned
                os.close(journal.fd)
    theirs.close()


def test_what_a_source_needs_is_imported_for_all_workers() -> None:
    """By the keeper, once; a module that is not there is no matter of the keeper's."""
    pack = Pack(Service(aiouffd.ObjectSource("https://host/key")), Options())
    code = (
        "import sys; from aiouffd.pager.process import keeper, state;"
        f"keeper.import_for(state.State(origins={{1: {{'config': {pack.config.fileno()}}}, 2: {{'config': -1}}}}));"
        "sys.exit('aiouffd.sources.object_store' not in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, pass_fds=[pack.config.fileno()])
    pack.close()


def test_a_clone_that_failed_in_a_keeper_that_was_killed() -> None:
    """The number in the journal is free then, and the next keeper's own: that does not take itself for its worker."""
    journal = Journal.create()
    with OwnedDescriptor(journal.fd), OwnedDescriptor(os.pidfd_open(os.getpid())) as pidfd:
        journal.note_descriptor(Whose.KEEPER, pidfd.fileno())
        journal.note_descriptor(Whose.WORKER, pidfd.fileno())
        absent: Any = None
        assert not _Keeper(journal, absent, absent, absent)._has_worker()
        assert journal.descriptor(Whose.WORKER) == -1
        assert pidfd.intact


def test_workers_that_die_without_serving_anything_are_given_up() -> None:
    """After the fifth the client is told why, and the keeper ends."""
    with running() as pager:
        for _ in range(4):
            crash(pager.pair.worker_pid)
            pager.ready()
        crash(pager.pair.worker_pid)
        message = pager.hear()
        assert message["event"] in ("died", "failing")
        assert "5 workers died" in str(message["error"])


@pytest.mark.parametrize("spare", [0, 1])
def test_where_a_worker_finds_no_room_for_its_descriptors(spare: int) -> None:
    """The limit is named, whether it is the keeper's or the worker's descriptor that finds no room."""
    with running() as pager:
        keeper, worker = pager.pair.keeper.pid, pager.pair.worker_pid
        pidfds = [int(fd) for fd, name in descriptors(keeper).items() if name == "anon_inode:[pidfd]"]
        resource.prlimit(keeper, resource.RLIMIT_NOFILE, (min(pidfds) + spare,) * 2)
        kill(worker)
        message = pager.hear()
        assert message["event"] == ("failing" if spare else "died")
        assert "RLIMIT_NOFILE" in message["error"]["text"]
