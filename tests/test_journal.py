"""`pager.journal`: what a worker leaves behind, whenever it is killed."""

from __future__ import annotations

import os
import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.kernel import abi
from aiouffd.pager.process import journal as module
from aiouffd.pager.process.journal import Journal


class Space:
    """Stands for a space: the journal asks only for its identity."""

    def __init__(self, identity: int) -> None:
        self.identity = identity


def remove(number: int) -> bytes:
    """Return a REMOVE message that can be told from others."""
    return struct.pack("=B7xQQ8x", abi.EVENT_REMOVE, number * 4096, (number + 1) * 4096)


def fault(number: int) -> bytes:
    """Return a PAGEFAULT message."""
    return abi.PAGEFAULT_MESSAGE.pack(abi.EVENT_PAGEFAULT, 0, number * 4096, 1)


def land(journal: Journal, messages: list[bytes]) -> None:
    """Do as read(2) does."""
    data = b"".join(messages)
    journal.buffers[0][: len(data)] = data


def successor(journal: Journal) -> Journal:
    """Open the same memory as another process would."""
    return Journal(os.dup(journal.fd))


_batches = st.lists(
    st.tuples(st.integers(1, 3), st.lists(st.booleans(), min_size=1, max_size=64), st.sampled_from(["read", "commit"])),
    max_size=20,
)


@given(_batches, st.integers(0, 4))
def test_no_event_is_lost_or_seen_twice(batches: list[tuple[int, list[bool], str]], saves: int) -> None:
    """Killed behind a read or behind a commit: the successor sees each layout event once, in order, with its space."""
    journal = Journal.create()
    expected: list[tuple[int, bytes]] = []
    number = 0
    for index, (identity, kinds, killed_behind) in enumerate(batches):
        if index < saves:
            journal.save({"events": len(expected)})
            expected = []
        messages = []
        for is_layout in kinds:
            number += 1
            messages.append(remove(number) if is_layout else fault(number))
        journal.reading(identity)
        land(journal, messages)
        layout = [message for message in messages if message[0] == abi.EVENT_REMOVE]
        expected += [(identity, message) for message in layout]
        if layout and killed_behind == "commit":
            journal.commit(Space(identity), layout)  # type: ignore[arg-type]
        elif layout:  # killed: a successor takes over
            journal = successor(journal)
            assert journal.load()[1] == expected
            assert journal.fresh == len(layout)
            if len(layout) % 2:  # it dies as well, before it has saved anything
                journal = successor(journal)
                assert journal.load()[1] == expected
            journal.save({"events": len(expected)}, landed=True)
            assert journal.fresh == 0
            expected = []
        assert journal.load()[1] == expected
    assert successor(journal).load()[1] == expected


def test_a_full_log_is_replaced_by_a_snapshot() -> None:
    """The log is bounded: when it is full the state is asked for, and begins a new one."""
    journal = Journal.create()
    asked: list[int] = []

    def state() -> Any:
        asked.append(1)
        return {"spaces": [], "count": len(asked)}

    journal.on_full = state
    for number in range(module._LOG_RECORDS + 10):
        journal.commit(Space(1), [remove(number)])  # type: ignore[arg-type]
    snapshot, events = journal.load()
    assert snapshot == {"spaces": [], "count": 1}
    assert [message for _, message in events] == [
        remove(number) for number in range(module._LOG_RECORDS, module._LOG_RECORDS + 10)
    ]


def test_counters_are_shared() -> None:
    """What one process counts, another that maps the journal reads."""
    journal = Journal.create()
    other = successor(journal)
    journal.counters.words[0] += 7
    assert other.counters.snapshot().faults == 7


def test_a_successor_finds_all_when_the_log_is_full() -> None:
    """Killed behind a read that the full log has no room for: nothing is replaced before the successor knows it."""
    journal = Journal.create()
    journal.save({"known": 1})
    for number in range(module._LOG_RECORDS):
        journal.commit(Space(1), [remove(number)])  # type: ignore[arg-type]
    journal.reading(1)
    land(journal, [remove(9999)])
    journal = successor(journal)
    snapshot, events = journal.load()
    assert snapshot == {"known": 1}
    assert len(events) == module._LOG_RECORDS + 1
    assert events[-1] == (1, remove(9999))
    journal.save({"known": 2}, landed=True)
    assert successor(journal).load() == ({"known": 2}, [])
