"""`engine.deferred`: what is put off, once, until when it is reported, and what a change of the layout leaves of it."""

from __future__ import annotations

from aiouffd.engine.deferred import Deferred
from aiouffd.engine.runs import Op, Run

PAGE = 4096
S = 1_000_000_000


def run(page: int, count: int = 1, op: int = Op.COPY) -> Run:
    """Return a run."""
    return Run(op, page * PAGE, page * PAGE, count * PAGE)


def test_what_is_covered_is_not_put_off_again() -> None:
    """By one run of the same operation; a neighbour, a larger one and another operation are."""
    deferred = Deferred()
    assert not deferred
    assert deferred.add(run(4, 4), 0)
    assert not deferred.add(run(4, 4), 0)
    assert not deferred.add(run(5, 2), 0)
    assert deferred.add(run(3, 2), 0)
    assert deferred.add(run(7, 2), 0)
    assert deferred.add(run(5, 1, Op.ZEROPAGE), 0)
    assert len(deferred) == 4
    assert [item.dst // PAGE for item in deferred] == [4, 3, 7, 5]


def test_what_it_fills() -> None:
    """Whole runs of what brings pages: a poison, or a protection that is lifted, brings none."""
    deferred = Deferred()
    for page, op in enumerate((Op.POISON, Op.UNPROTECT, Op.PROTECT, Op.COPY, Op.ZEROPAGE, Op.CONTINUE)):
        deferred.add(run(2 * page, 1, op), 0)
    deferred.add(run(20, 3), 0)
    assert [page for page in range(30) if deferred.fills(page * PAGE)] == [6, 8, 10, 20, 21, 22]


def test_what_is_taken_out_is_put_back_as_it_was() -> None:
    """Its age counts from when it was put off first."""
    deferred = Deferred()
    deferred.add(run(1), 10)
    (item,) = deferred.take()
    assert not deferred
    deferred.keep(item)
    (again,) = deferred.take()
    assert again is item
    assert again.since_ns == 10


def test_it_is_reported_after_5_seconds_and_then_each_minute() -> None:
    """Not before, and not at each try."""
    deferred = Deferred()
    deferred.add(run(1), 100)
    (item,) = deferred.take()
    assert not item.is_due(100 + 5 * S)
    assert item.is_due(101 + 5 * S)
    assert not item.is_due(101 + 65 * S)
    assert item.is_due(102 + 65 * S)


def test_after_a_change_of_the_layout() -> None:
    """Parts keep the age of what they are parts of."""
    deferred = Deferred()
    deferred.add(run(0, 4), 7)
    deferred.add(run(8), 8)
    deferred.revise(lambda item: [item.part(PAGE, PAGE), item.part(3 * PAGE, PAGE)] if item.left > PAGE else [])
    assert [(item.run.dst // PAGE, item.run.left // PAGE, item.since_ns) for item in deferred.take()] == [
        (1, 1, 7),
        (3, 1, 7),
    ]
    deferred.add(run(0, 4), 100)
    deferred.revise(lambda item: [item.part(0, PAGE)])
    (part,) = deferred.take()
    assert not part.is_due(100 + 5 * S)
    assert part.is_due(101 + 5 * S)


def test_all_is_forgotten() -> None:
    """When the process is gone."""
    deferred = Deferred()
    deferred.add(run(0), 0)
    deferred.clear()
    assert deferred.take() == []
