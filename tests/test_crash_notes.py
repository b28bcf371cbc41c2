"""`native.crash_notes`: a fatal signal in a noted range is explained, and handled as it would have been."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import tempfile

import pytest
import touchers
from scenario import play

from aiouffd.native.crash_notes import Note, When

PAGE = mmap.PAGESIZE


def broken_memory() -> tuple[mmap.mmap, int]:
    """Return memory of two pages, the second behind the end of its file; and its address."""
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * PAGE)
        memory = mmap.mmap(file.fileno(), 2 * PAGE)
        file.truncate(PAGE)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def touched(what: str) -> None:
    """Scenario: SIGBUS in a range, with a note or without."""
    memory, address = broken_memory()
    note = Note(address + (0 if what == "moved" else PAGE), PAGE)
    note.say(When.LEFT, "x" * 1000 if what == "long" else "This is why.")
    if what == "moved":
        note.move(address + PAGE, PAGE)
    elif what == "closed":
        note.close()
    elif what == "gone":
        del note
    elif what == "elsewhere":
        note.move(address, PAGE)
    elif what == "absent":
        note.close()
        note = Note(address, 2 * PAGE)
        note.say(When.ABSENT, "In a child only.")
    memory[PAGE + 7]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        *(("", True), ("moved", True), ("long", True)),
        *(("closed", False), ("gone", False), ("elsewhere", False), ("absent", False)),
    ],
)
def test_sigbus_in_a_range(what: str, said: bool) -> None:
    """The line has the thread, the offset and the sentence, once; and the traceback follows."""
    _, errors = play(touched, what, status=-signal.SIGBUS)
    assert errors.count("aiouffd: thread ") == said
    assert (", byte 7 of a region. " in errors) == said
    assert ("This is why." in errors or "x" * 500 in errors) == said
    assert errors.count("Fatal Python error: Bus error") == 1
    assert "in touched" in errors


def a_handler_that_jumps() -> None:
    """Scenario: a program that lives with SIGBUS goes on doing so."""
    memory, address = broken_memory()
    library = touchers.free()
    before = library.sigbus()
    library.take_sigbus(2)
    theirs = library.sigbus()
    note = Note(address + PAGE, PAGE)
    note.say(When.LEFT, "This is why.")
    assert library.sigbus() not in (before, theirs)
    for _ in range(3):
        assert library.probe(address + PAGE) == -1
    assert library.times_called() == 3
    note.close()
    assert library.sigbus() == theirs
    assert memory[0] == 0


def test_a_handler_below_gets_it() -> None:
    """It is called each time, and has the signal again when the note is closed."""
    _, errors = play(a_handler_that_jumps)
    assert errors.count("This is why.") == 1


def in_a_child(how: str) -> None:
    """Scenario: a forked child crashes within the range, or elsewhere, or is sent a SIGSEGV."""
    memory = mmap.mmap(-1, 4 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    note = Note(address, PAGE)
    note.say(When.ABSENT, "The child does not have it.")
    if how == "no handler":
        faulthandler.disable()
    memory.madvise(mmap.MADV_DONTFORK)
    pid = os.fork()
    if pid == 0:
        if how == "sent":
            os.kill(os.getpid(), signal.SIGSEGV)
        memory[2 * PAGE if how == "elsewhere" else 5]
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
    assert memory[5] == 0
    print("the parent lives", file=sys.stderr)


@pytest.mark.parametrize("how", ["", "no handler", "elsewhere", "sent"])
def test_sigsegv_in_a_forked_child(how: str) -> None:
    """It is explained where the range is concerned; and is SIGSEGV in any case, with the traceback."""
    _, errors = play(in_a_child, how)
    assert errors.count("byte 5 of a region. The child does not have it.") == (how in ("", "no handler"))
    assert ("in in_a_child" in errors) == (how != "no handler")
    assert "the parent lives" in errors


def many() -> None:
    """Scenario: more ranges than there is room for."""
    notes = [Note(PAGE * number, PAGE) for number in range(1, 600)]
    for note in notes:
        note.say(When.LEFT, "any")
        note.move(PAGE, PAGE)
    del notes, note
    memory, address = broken_memory()
    last = Note(address, 2 * PAGE)
    last.say(When.LEFT, "There was room again.")
    memory[PAGE]


def test_more_ranges_than_there_is_room_for() -> None:
    """Nothing is said of the last ones, and their room is used again."""
    _, errors = play(many, status=-signal.SIGBUS)
    assert "There was room again." in errors
