"""`keeper`: keeps a worker alive that shares its descriptors, and ends with it."""

from __future__ import annotations

import os
from pathlib import Path

from pairs import running
from processes import ended, kill
from scenario import eventually


def parent_of(pid: int) -> int:
    """Return who has started a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descriptors(pid: int) -> dict[str, str]:
    """Return the table of descriptors."""
    return {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}  # noqa: PTH115, PTH208 - names only


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
        assert descriptors(keeper) == descriptors(worker)
        assert any("socket" in name for name in descriptors(keeper).values())


def test_what_a_dead_worker_has_left_is_closed() -> None:
    """Descriptors of which no journal speaks do not pile up."""
    with running() as pager:
        keeper = pager.pair.keeper.pid
        before = len(descriptors(keeper))
        for _ in range(3):
            kill(pager.pair.worker_pid)
            pager.ready()
            # What it has sent its pidfd by is open for a moment.
            eventually(lambda: len(descriptors(keeper)) <= before, expected=True)


def test_workers_that_die_without_serving_anything_are_given_up() -> None:
    """After the fifth the client is told why, and the keeper ends."""
    with running() as pager:
        for _ in range(4):
            kill(pager.pair.worker_pid)
            pager.ready()
        kill(pager.pair.worker_pid)
        message = pager.hear()
        assert message["event"] in ("died", "failing")
        assert "5 workers died" in str(message["error"])
