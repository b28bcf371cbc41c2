"""`process.notes`: what a pager's owner has kept is in the journal, replaced and forgotten by name."""

from __future__ import annotations

import os

import pytest

from aiouffd.errors import PagerStartError
from aiouffd.pager.process.journal import Journal, JournalFullError
from aiouffd.pager.process.notes import Notes
from aiouffd.pager.process.replay import survey
from aiouffd.pager.process.state import Meta, Note, State


def test_notes() -> None:
    """What is replaced or forgotten is closed, and a journal that was written anew has them as well."""
    journal = Journal.create()
    journal.change(journal.write_anew(0, Meta().encode()))
    closed: list[int] = []
    notes = Notes(journal.append, lambda *fds: closed.extend(fds))
    (first, second), (third, fourth) = os.pipe(), os.pipe()
    notes.keep(Note("a", {"n": 1}, [first]))
    notes.keep(Note("b", {}, [second]))
    notes.keep(Note("a", {"n": 2}, [third]))
    assert closed == [first]
    notes.forget("b")
    notes.forget("never")
    assert closed == [first, second]
    state = survey(journal)
    assert state is not None
    assert state.notes == {"a": Note("a", {"n": 2}, [third])}
    assert state.numbers == {third}
    journal.change(journal.write_anew(0, State(notes=state.notes).encode()))
    again = survey(journal)
    assert again is not None
    assert again.notes == state.notes

    def full(_: object) -> None:
        raise JournalFullError

    with pytest.raises(PagerStartError, match="no room"):
        Notes(full, lambda *fds: closed.extend(fds)).keep(Note("c", {}, [third]))
    assert closed == [first, second, third]
    for fd in (*closed, fourth):
        os.close(fd)
