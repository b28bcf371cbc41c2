"""Programs on a `machine.Machine`: `plan` makes them of raw steps, `Stage` runs them, each in a process of its own."""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import attrs
from machine import SLOT, SLOTS, TAIL, name_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["STEPS", "Stage", "Step", "plan"]

DEFAULTS = {
    "source_pages": None,
    "shared": False,
    "source": "hand",
    "readahead": 2 << 20,
    "lies": -1,
    "hangs": -1,
    "engine": "pager",
    "background": False,
    "tracked": False,
}
"""Of `Machine`: a program names what it has otherwise."""

Step = tuple[str, int, int, int]
STEPS = (
    *("touch", "write", "remove", "move", "stretch", "grow", "shrink", "onto", "leave", "unmap", "replace"),
    *("fork", "end", "prefetch", "storm", "check", "kill", "cancel", "fail", "resize", "collect"),
)
IN_PROCESS = {"touch", "write", "remove", "prefetch", "storm", "check", "cancel", "fail", "resize", "collect"}
"""What an engine in the same process serves: no changes of the layout but by the region's methods, and no forks."""
KILLS = 4
"""Of a program, at most: five that come too fast for anything to be served between them are given up."""


@attrs.define
class _Page:
    """What a plan knows of a page: which mapping it belongs to, and which page of a shared file it shows."""

    mapping: int
    index: int = -1
    served: bool = True


@attrs.define
class Plan:
    """A program in the making: what is mapped where, so that each statement is one that the kernel accepts."""

    options: dict[str, Any]
    pages: int
    shared: bool
    lines: list[str] = attrs.Factory(list)
    pieces: list[tuple[str, list[_Page | None]]] = attrs.Factory(list)
    outer: list[list[tuple[str, list[_Page | None]]]] = attrs.Factory(list)
    mappings: int = 0
    moves: int = 0
    kills: int = 0

    def __attrs_post_init__(self) -> None:
        self.pieces.append(("a", [_Page(0, index) for index in range(self.pages)]))

    def text(self) -> str:
        """Return the program."""
        while self.outer:
            self.end()
        given = [f"{name}={value!r}" for name, value in self.options.items() if DEFAULTS[name] != value]
        arguments = ", ".join([str(self.pages), *given])
        head = ["from machine import Machine", "", f"with Machine({arguments}) as m:", "    a = m.region"]
        return "\n".join([*head, *self.lines]) + "\n"

    def say(self, statement: str) -> None:
        """Add a statement."""
        self.lines.append("    " * (1 + len(self.outer)) + statement)

    def _range(self, x: int, y: int, z: int, *, served: bool = True) -> tuple[str, list[_Page | None], int, int] | None:
        """Pick pages of one mapping: name, all pages of the piece, first, count."""
        candidates = [(name, pages) for name, pages in self.pieces if any(_fits(page, served=served) for page in pages)]
        if not candidates:
            return None
        name, pages = candidates[x % len(candidates)]
        places = [at for at, page in enumerate(pages) if _fits(page, served=served)]
        first = places[y % len(places)]
        count, mapping = 0, pages[first]
        assert mapping is not None
        while (
            count <= z % 8
            and first + count < len(pages)
            and (page := pages[first + count]) is not None
            and page.mapping == mapping.mapping
        ):
            count += 1
        return name, pages, first, count

    def touch(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        if found := self._range(x, y, 0, served=False):
            self.say(f"{found[0]}.touch({found[2]})")

    def write(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        if found := self._range(x, y, 0, served=False):
            self.say(f"{found[0]}.write({found[2]}, {1 + z})")

    def remove(self, x: int, y: int, z: int) -> None:
        """Plan it. Of shared memory in no child: its hole in the file sends no event to the parent's descriptor."""
        if (found := self._range(x, y, z)) and not (self.shared and self.outer):
            self.say(f"{found[0]}.remove({found[2]}, {found[3]})")

    def _moving(self, x: int, y: int, z: int, grown: int) -> tuple[str, int, int, list[_Page | None]] | None:
        """Take pages away; return name, first, count, and what the new piece has."""
        if not (found := self._range(x, y, z)) or self.moves == SLOTS:
            return None
        name, pages, first, count = found
        self.mappings += 1
        last = pages[first + count - 1]
        assert last is not None
        # A file that is mapped further shows its next pages; only those behind the region are known to be zeros.
        if grown and self.shared and not self.pages - 1 <= last.index < self.pages + TAIL - grown:
            return None
        new: list[_Page | None] = [
            _Page(self.mappings, page.index) for page in pages[first : first + count] if page is not None
        ]
        new += [_Page(self.mappings, last.index + 1 + n) for n in range(grown)]
        if len(new) > SLOT:
            return None
        pages[first : first + count] = [None] * count
        return name, first, count, new

    def _named(self, pages: list[_Page | None]) -> str:
        name = name_of(len(self.pieces))
        self.pieces.append((name, pages))
        return name

    def move(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        if found := self._moving(x, y, z, 0):
            self.moves += 1
            self.say(f"{self._named(found[3])} = {found[0]}.move({found[1]}, {found[2]})")

    def stretch(self, x: int, y: int, z: int) -> None:
        """Plan a move that grows."""
        if found := self._moving(x, y, z, 1 + z % 5):
            self.moves += 1
            self.say(f"{self._named(found[3])} = {found[0]}.move({found[1]}, {found[2]}, to={len(found[3])})")

    def grow(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        if found := self._moving(x, y, z, 1 + z % 5):
            self.say(f"{self._named(found[3])} = {found[0]}.grow({found[1]}, {found[2]}, {len(found[3])})")

    def shrink(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        if (found := self._range(x, y, z)) and found[3] > 1:
            name, pages, first, count = found
            to = 1 + z % (count - 1)
            pages[first + to : first + count] = [None] * (count - to)
            self.say(f"{name}.shrink({first}, {count}, {to})")

    def onto(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        if not (target := self._range(y, x, z, served=False)):
            return
        other, pages, at, length = target
        kept, pages[at : at + length] = pages[at : at + length], [None] * length  # it must not be its own target
        found = self._moving(x, y, length - 1, 0)
        if found is None:
            pages[at : at + length] = kept
            return
        pages[at + found[2] : at + length] = kept[found[2] :]
        self.say(f"{self._named(found[3])} = {found[0]}.onto({found[1]}, {found[2]}, {other}, {at})")

    def leave(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        if self.shared or not (picked := self._range(x, y, z)):
            return
        kept = list(picked[1])
        if found := self._moving(x, y, z, 0):
            self.moves += 1
            picked[1][:] = kept
            self.say(f"{self._named(found[3])} = {found[0]}.leave({found[1]}, {found[2]})")

    def unmap(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        if found := self._range(x, y, z, served=False):
            name, pages, first, count = found
            pages[first : first + count] = [None] * count
            self.say(f"{name}.unmap({first}, {count})")

    def replace(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        if found := self._range(x, y, z):
            name, pages, first, count = found
            self.mappings += 1
            pages[first : first + count] = [_Page(self.mappings, served=False) for _ in range(count)]
            self.say(f"{name}.replace({first}, {count})")

    def fork(self, x: int, y: int, z: int) -> None:
        """Plan a child: what follows is its own, until it ends."""
        if len(self.outer) < 3:
            self.say("if m.fork():")
            self.outer.append(copy.deepcopy(self.pieces))

    def end(self, *_: int) -> None:
        """Plan the end of a child."""
        if self.outer:
            self.say("m.exit()")
            self.pieces = self.outer.pop()

    def _window(self, y: int, z: int) -> tuple[int, int]:
        """Pick pages of the region's first layout, or of what it has been resized to."""
        pages = len(self.pieces[0][1])
        first = y % pages
        return first, 1 + z % (pages - first)

    def prefetch(self, x: int, y: int, z: int) -> None:
        """Plan it, for whoever has entered the Monitor."""
        if not self.outer:
            first, count = self._window(y, z)
            self.say(f"m.prefetch({first}, {count})")

    @property
    def local(self) -> bool:
        """Whether the engine runs in the process itself."""
        return self.options.get("engine", "pager") in {"in_thread", "in_process"}

    def kill(self, x: int, y: int, z: int) -> None:
        """Plan the death of a worker, or of a keeper."""
        if not self.outer and self.kills < KILLS:
            self.kills += 1
            self.say(f"m.kill({0 if z % 4 == 0 else 1})")

    def cancel(self, x: int, y: int, z: int) -> None:
        """Plan a prefetch that is canceled."""
        if not self.outer:
            first, count = self._window(y, z)
            self.say(f"m.cancel({first}, {count})")

    def fail(self, x: int, y: int, z: int) -> None:
        """Plan failing reads."""
        self.say(f"m.fail({1 + z % 3})")

    def resize(self, x: int, y: int, z: int) -> None:
        """Plan it, where the region is whole."""
        if self.local and not self.shared:
            pages = self.pieces[0][1]
            count = 1 + z % 48
            del pages[count:]
            pages += [_Page(0, index) for index in range(len(pages), count)]
            self.say(f"m.resize({count})")

    def collect(self, x: int, y: int, z: int) -> None:
        """Plan it, where the region is whole."""
        if self.local and self.options.get("tracked"):
            self.say("m.collect()")

    def storm(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        self.say(f"m.storm({2 + z % 3})")

    def check(self, x: int, y: int, z: int) -> None:
        """Plan it."""
        self.say("m.check()")


def _fits(page: _Page | None, *, served: bool) -> bool:
    return page is not None and (page.served or not served)


def plan(pages: int, steps: Sequence[Step | None], options: dict[str, Any]) -> str:
    """Return the program that some steps come to; None is no step at all."""
    if options.get("engine") == "served_by":  # a server refuses memory that reaches behind its source
        options = options | {"source_pages": None}
    made = Plan(options, pages, options.get("shared", False))
    for step in steps:
        if step is not None and (not made.local or step[0] in IN_PROCESS):
            getattr(made, step[0])(*step[1:])
    return made.text()


class Stage:
    """A child process that runs programs, each in a forked process of its own under a deadline.

    Attributes:
        counts: kills, failed reads and canceled prefetches of all programs that were right.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._left = tempfile.TemporaryDirectory()  # what programs leave: they are killed at their end
        here = str(Path(__file__).parent)
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r}); import programs; programs.perform()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": self._left.name},
        )

    def run(self, program: str, deadline: float) -> str | None:
        """Run a program; return what went wrong, or None."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([program, deadline]) + "\n")
        self.process.stdin.flush()
        failure: str | None
        failure, counts = json.loads(self.process.stdout.readline())
        self.counts.update(counts)
        return failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()  # a program that still runs has the pipes, too
        self.process.stdin.close()
        self.process.stdout.close()
        self._left.cleanup()


def perform() -> None:
    """Be the stage: programs come on standard input, what they came to goes to standard output."""
    for line in sys.stdin:
        program, deadline = json.loads(line)
        sys.stdout.write(json.dumps(_perform(program, deadline)) + "\n")
        sys.stdout.flush()


def _perform(program: str, deadline: float) -> tuple[str | None, dict[str, int]]:
    said = os.memfd_create("said")
    pid = os.fork()
    if pid == 0:
        _act(program, deadline, said)
    pidfd = os.pidfd_open(pid)
    finished = bool(select.select([pidfd], [], [], deadline + 5)[0])
    os.close(pidfd)
    try:
        os.killpg(pid, signal.SIGKILL)  # its forked children as well
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)  # not in its group yet, or no longer anything but a zombie
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(said, "rb") as file:
        file.seek(0)
        text = file.read().decode(errors="replace")
    if finished and status == 0:
        counts = next(line for line in text.splitlines() if line.startswith("counts "))  # a pager's log is there, too
        return None, json.loads(counts.removeprefix("counts "))
    hung = not finished or "Timeout (" in text
    ended = f"it hung for {deadline} s" if hung else f"it ended with {status}"
    return f"{ended}:\n{text[-4000:]}", {}


def _act(program: str, deadline: float, said: int) -> NoReturn:
    os.setsid()
    os.dup2(said, 1)
    os.dup2(said, 2)
    status = 1
    try:
        faulthandler.enable()
        faulthandler.dump_traceback_later(deadline, exit=True)
        exec(compile(program, "<program>", "exec"), {"__name__": "program"})
        status = 0
    except BaseException:  # noqa: BLE001 - whatever it is, it is this program's outcome
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)
