"""`pager.process.journal`: what a worker leaves behind, whenever it is killed."""

from __future__ import annotations

import mmap
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.statistics import Counter
from aiouffd.kernel import abi
from aiouffd.pager.process import journal as module
from aiouffd.pager.process.journal import SLOTS, Journal, JournalFullError
from aiouffd.pager.process.state import EVENT_SIZE, Kind, Record, encode


class Space:
    """Stands for a space: the journal asks only for its identity."""

    def __init__(self, identity: int) -> None:
        self.identity = identity


def remove(number: int) -> bytes:
    """Return a REMOVE message that can be told from others."""
    return struct.pack("=B7xQQ8x", abi.EVENT_REMOVE, number * 4096, (number + 1) * 4096)


def fork(fd: int) -> bytes:
    """Return a FORK message."""
    return struct.pack("=B7xI20x", abi.EVENT_FORK, fd)


def fault(number: int) -> bytes:
    """Return a PAGEFAULT message."""
    return abi.PAGEFAULT_MESSAGE.pack(abi.EVENT_PAGEFAULT, 0, number * 4096, 1)


def land(journal: Journal, messages: list[bytes]) -> None:
    """Do as read(2) does."""
    data = b"".join(messages)
    journal.buffer[: len(data)] = data


def commit(journal: Journal, identity: int, messages: list[bytes]) -> None:
    """Do as the dispatcher does."""
    journal.commit(Space(identity), messages)  # type: ignore[arg-type]


def successor(journal: Journal) -> Journal:
    """Map the same memory as a worker would that is forked now: its keeper's mapping can be written to."""
    again = Journal.__new__(Journal)
    again.__dict__ |= vars(journal)
    return again


def test_messages_land_where_a_successor_looks() -> None:
    """A worker is forked from the keeper, which knows nothing of how often the landing was changed."""
    keeper = Journal.create()
    for times in range(3):
        worker = successor(keeper)
        land(worker, [remove(times)])
        assert events(worker)[-1:] == [(0, remove(times))]
        commit(worker, 0, [remove(times)])


def events(journal: Journal) -> list[tuple[int, bytes]]:
    """Return the layout events, uncommitted ones included, each with its space."""
    content = journal.load()
    logged = [(item.identity, item.content) for item in content.records if item.kind is Kind.EVENT]
    return logged + [(content.identity, message) for message in content.landed]


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
            journal.change(journal.write_anew(0, encode(Kind.META)))
            expected = []
        messages = []
        for is_layout in kinds:
            number += 1
            messages.append(remove(number) if is_layout else fault(number))
        journal.before_reading()
        journal.identity[0] = identity
        land(journal, messages)
        layout = [message for message in messages if message[0] == abi.EVENT_REMOVE]
        expected += [(identity, message) for message in layout]
        if layout and killed_behind == "commit":
            commit(journal, identity, layout)
        elif layout:  # killed: a successor takes over
            journal = successor(journal)
            assert events(journal) == expected
            assert journal.load().landed == layout
            if len(layout) % 2:  # it dies as well, before it has written anything
                journal = successor(journal)
                assert events(journal) == expected
            journal.commit_events(identity, layout)
            assert journal.load().landed == []
        assert events(journal) == expected
    assert events(Journal(os.dup(journal.fd))) == expected


def test_forked_children_have_their_identities_in_the_journal() -> None:
    """They are those that the worker is about to give them, one after the other."""
    journal = Journal.create()
    journal.next_identity = lambda: 7
    kept: list[tuple[int, int, int]] = []
    journal.keep = lambda child, fd: kept.append((child, fd, len(journal.load().records)))
    commit(journal, 1, [fork(20), remove(1), fork(21)])
    assert kept == [(7, 20, 0), (8, 21, 0)]  # before the journal speaks of them
    assert [(item.content, item.child) for item in journal.load().records] == [
        (fork(20), 7),
        (remove(1), -1),
        (fork(21), 8),
    ]


def test_records_that_count_together() -> None:
    """All of them, or none: there is one commit."""
    journal = Journal.create()
    journal.append((Kind.SPACE, 3, b"{}"), (Kind.MAPPINGS, 3, bytes(24)))
    journal.append((Kind.CLOSED, 3, b""))
    assert journal.load().records == [
        Record(Kind.SPACE, 3, -1, b"{}"),
        Record(Kind.MAPPINGS, 3, -1, bytes(24)),
        Record(Kind.CLOSED, 3, -1, b""),
    ]
    before = journal.load().records
    with pytest.raises(JournalFullError):
        journal.append((Kind.META, 0, b"{}"), (Kind.SPACE, 4, bytes(journal.room)))
    assert journal.load().records == before


def test_a_new_log_counts_all_at_once() -> None:
    """What is written to the other log is not seen before the change, and the old one not behind it."""
    journal = Journal.create()
    commit(journal, 1, [remove(1)])
    at = journal.write_anew(0, encode(Kind.META, 0, b"{}"))
    assert events(journal) == [(1, remove(1))]
    at = journal.write_anew(at, encode(Kind.RETIRED, 9))
    journal.change(at)
    assert [item.kind for item in journal.load().records] == [Kind.META, Kind.RETIRED]
    commit(journal, 1, [remove(2)])
    assert events(journal) == [(1, remove(2))]
    with pytest.raises(JournalFullError):
        journal.write_anew(0, bytes(journal.capacity + 8))


def test_events_have_room_in_a_full_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other records do not take it; and the end of something has room, too."""
    monkeypatch.setattr(module, "_LOG_SIZE", 1 << 20)
    journal = Journal.create()
    while journal.room >= 1 << 10:
        journal.append((Kind.META, 0, bytes(1000)))
    with pytest.raises(JournalFullError):
        journal.append((Kind.META, 0, bytes(1000)))
    for number in range(33):
        commit(journal, 1, [remove(64 * number + each) for each in range(64)])
    assert events(journal) == [(1, remove(number)) for number in range(33 * 64)]
    assert journal.room < 0
    assert -journal.room <= 33 * 64 * EVENT_SIZE
    journal.append((Kind.CLOSED, 1, b""))


def test_growth_is_told_before_the_next_read() -> None:
    """Not in the middle of a batch, whose events are applied one by one."""
    journal = Journal.create()
    told: list[int] = []
    journal.threshold = 3 * EVENT_SIZE
    journal.on_growth = lambda: told.append(journal.size)
    for number in range(4):
        commit(journal, 1, [remove(number)])
    assert told == []
    journal.before_reading()
    journal.identity[0] = 1
    assert told == [4 * EVENT_SIZE]
    journal.before_reading()
    journal.identity[0] = 1
    assert len(told) == 1


def test_counters_are_shared() -> None:
    """What one process counts, another that maps the journal reads."""
    journal = Journal.create()
    other = Journal(os.dup(journal.fd))
    journal.counters.words[0] += 7
    assert other.counters.snapshot().faults == 7


def test_only_its_maker_can_write() -> None:
    """Not the application, nor a forked child of it: they have the descriptor."""
    journal = Journal.create()
    other = Journal(os.dup(journal.fd))
    with pytest.raises(TypeError):
        other.counters.words[0] = 1
    with pytest.raises(PermissionError):
        mmap.mmap(journal.fd, 4096)
    with pytest.raises(PermissionError):
        os.pwrite(journal.fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(journal.fd, 0)
    journal.counters.words[0] = 1


def test_progress_is_what_this_pager_has_made() -> None:
    """Not what its tenants bring along, or take with them; a pager that serves nothing makes none, whoever comes."""
    journal, successor = Journal.create(), Journal.create()
    served = [0] * (Counter.PAGES_FAULT + 1)
    served[Counter.PAGES_FAULT] = 100
    for slot in (1, 2):
        journal.use_slot(slot, served)
    journal.resume(served)
    assert journal.counters.words[Counter.PAGES_FAULT] == 100
    assert journal.progress() == 0
    for slot in (0, 2):
        journal.counters_of(slot).words[Counter.PAGES_FAULT] += 1
    assert journal.progress() == 2
    journal.use_slot(2, [])
    assert journal.progress() == 2
    journal.counters_of(2).words[Counter.PAGES_FAULT] += 1
    assert journal.progress() == 3
    successor.take_counters(journal)
    assert successor.counters_of(2).words[Counter.PAGES_FAULT] == 1
    assert successor.progress() == 0
    successor.counters_of(2).words[Counter.PAGES_FAULT] += 1
    assert successor.progress() == 1


def test_a_user_of_a_slot_does_not_go_back() -> None:
    """Who is asked for twice, or by one who does not know what others have been counted for; the next one begins."""
    journal, successor = Journal.create(), Journal.create()
    journal.use_slot(3, [], user=8)
    words = journal.counters_of(3).words
    words[Counter.PAGES_FAULT] = 5
    journal.use_slot(3, [9], user=8)
    assert (words[Counter.FAULTS], words[Counter.PAGES_FAULT]) == (9, 5)
    successor.resume([], [(3, words.tolist())])
    successor.use_slot(3, [], user=8)
    assert successor.counters_of(3).words[Counter.PAGES_FAULT] == 5
    successor.use_slot(3, [], user=9)
    assert successor.counters_of(3).words[Counter.PAGES_FAULT] == 0


def test_each_slot_is_counted_by_itself() -> None:
    """And all of them together; a successor goes on, but for what was under way."""
    journal, successor = Journal.create(), Journal.create()
    journal.use_slot(2, [])
    journal.use_slot(1, [7])
    journal.use_slot(0, [1000])
    journal.counters.words[Counter.FAULTS] = 1
    journal.counters_of(2).words[Counter.FAULTS] = 20
    for counter in (Counter.IN_FLIGHT, Counter.BYTES_IN_FLIGHT, Counter.SPACES, Counter.COPIES):
        journal.counters_of(2).words[counter] = 4
    assert journal.total(Counter.FAULTS) == 28
    assert len(journal.all_counters) == 3
    before = journal.progress()
    journal.counters_of(2).words[Counter.PAGES_FAULT] += 1
    assert journal.progress() == before + 1
    successor.take_counters(journal)
    assert [successor.total(counter) for counter in (Counter.FAULTS, Counter.COPIES, Counter.SPACES)] == [28, 4, 0]
    assert successor.counters_of(2).snapshot().in_flight == successor.counters_of(2).snapshot().bytes_in_flight == 0
    journal.use_slot(2, [0, 0, 0, 5])
    assert journal.counters_of(2).words[:5].tolist() == [0, 0, 0, 5, 0]
    assert journal.total(Counter.COPIES) == 0
    for counter in (Counter.IN_FLIGHT, Counter.BYTES_IN_FLIGHT, Counter.SPACES):  # of a tenant whose reads end later
        assert journal.counters_of(2).words[counter] == 4
    journal.counters_of(SLOTS - 1).words[-1] = 1
    commit(journal, 1, [remove(3)])  # the log begins behind the last slot
    assert journal.counters_of(SLOTS - 1).words[-1] == 1
