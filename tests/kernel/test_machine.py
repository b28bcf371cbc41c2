"""Random programs in a process that each engine serves: each byte is what a plain model says, whatever came before.

The statements are those of `machine.Machine`: touching (GIL held or not, from one thread or several), writing,
emptying, resizing, mremap in all its forms, munmap, forking down to grandchildren and further, prefetching, canceling
that, collecting writes; the source fails, and the pager's processes are killed.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import STEPS, Stage, plan
from scenario import TESTS

from aiouffd import native

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ENGINES = ["pager", "pager", "served_by", "in_process", *([] if native.reason() else ["in_thread"])]
_number = st.integers(0, 63)
_step = st.none() | st.one_of([st.tuples(st.just(name), _number, _number, _number) for name in STEPS])
_options = st.fixed_dictionaries(
    {
        "source_pages": st.none() | st.integers(1, 24),
        "shared": st.booleans(),
        "source": st.sampled_from(["hand", "far", "buffer"]),
        "readahead": st.sampled_from([2 << 20, 0, 16 << 10]),
        "engine": st.sampled_from(_ENGINES),
        "background": st.booleans(),
        "tracked": st.booleans(),
    }
)
# As many steps in each: a list whose length is drawn is short on average. What shrinks becomes None, and is left out.
_programs = st.tuples(st.integers(1, 40), st.lists(_step, min_size=60, max_size=60), _options)


class Search:
    """Runs programs; one that fails is raised as its text, and is known from then on: a race need not come twice.

    Args:
        stage: where they run.
        deadline: seconds for each.
        shrinking: seconds to look for shorter ones, once one has failed.
        broken: options of `Machine` that are wrong on purpose.
    """

    def __init__(self, stage: Stage, *, deadline: float = 60.0, shrinking: float = 40.0, **broken: int) -> None:
        self.stage = stage
        self.deadline = deadline
        self.shrinking = shrinking
        self.broken = broken
        self.known: dict[str, str] = {}
        self.until = float("inf")
        self.statements = 0

    def try_program(self, pages: int, steps: list[Any], options: dict[str, Any]) -> None:
        """Run it; AssertionError with its text if it fails."""
        program = plan(pages, steps, options | self.broken)
        if program not in self.known:
            if time.monotonic() > self.until:
                return
            failure = self.stage.run(program, self.deadline)
            self.statements += program.count("\n") - 4
            if failure is None:
                return
            self.known[program] = failure
            self.until = min(self.until, time.monotonic() + self.shrinking)
        raise AssertionError(f"PYTHONPATH=tests python - <<'END'\n{program}END\n{self.known[program]}")

    def run(self, examples: int, seed: int | None = None, **chosen: Any) -> None:
        """Try so many programs, the same for the same seed; raise the shortest that fails."""

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            **chosen,
        )
        @given(_programs)
        def search(drawn: tuple[int, list[Any], dict[str, Any]]) -> None:
            self.try_program(*drawn)

        (search if seed is None else hypothesis.seed(seed)(search))()

    def __str__(self) -> str:
        counts = self.stage.counts
        told = ", ".join(f"{counts[name]} {name}" for name in ("kills", "failures", "canceled"))
        return f"{self.statements} statements, {told}"


@pytest.fixture
def stage() -> Iterator[Stage]:
    """Where programs run."""
    with Stage() as running:
        yield running


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_byte_is_what_a_plain_model_says(stage: Stage) -> None:
    """Thousands of random statements; a program that fails, or hangs, is printed, and as short as could be found."""
    search = Search(stage)
    search.run(150)
    assert search.statements > 3000
    assert all(stage.counts[name] > 0 for name in ("kills", "failures", "canceled")), stage.counts


@pytest.mark.nightly
@pytest.mark.timeout(0)
def test_every_byte_is_what_a_plain_model_says_for_an_hour(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """Hundreds of thousands. AIOUFFD_TEST_SEED and AIOUFFD_TEST_SECONDS choose other ones, and another time."""
    seed = int(os.environ.get("AIOUFFD_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
    end = time.monotonic() + float(os.environ.get("AIOUFFD_TEST_SECONDS") or 3600)
    search = Search(stage, shrinking=300.0)
    rounds = 0
    try:
        while time.monotonic() < end:
            search.run(50, seed + rounds)
            rounds += 1
    finally:
        with capsys.disabled():
            print(f"\nseed {seed}, {rounds} rounds of 50 programs: {search}", flush=True)
    assert rounds


def printed(stage: Stage, **broken: Any) -> tuple[str, str]:
    """Search with something broken; return the program that is printed, and what is said of it."""
    with pytest.raises(AssertionError) as caught:
        Search(stage, **broken).run(100, derandomize=True)
    head, _, rest = str(caught.value).partition("\n")
    assert head == "PYTHONPATH=tests python - <<'END'"
    program, _, said = rest.partition("END\n")
    return program, said


def paste(program: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Do what a reader does: put it into a file, and run that."""
    path.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.run(
        [sys.executable, path], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_wrong_byte_is_printed_as_a_short_program(stage: Stage, tmp_path: Path) -> None:
    """A source lies about one byte: what is printed fails when it is run, and is right with an honest source."""
    program, said = printed(stage, lies=3)
    assert len(program.splitlines()) <= 6, program  # the first four are its head
    assert "page 3 of" in said
    assert "byte 100: the memory holds" in said
    result = paste(program, tmp_path / "program.py")
    assert result.returncode == 1
    assert "byte 100: the memory holds" in result.stderr
    honest = paste(program.replace("lies=3", "lies=-1"), tmp_path / "honest.py")
    assert honest.returncode == 0, honest.stderr


def test_a_hang_is_printed_as_a_short_program(stage: Stage) -> None:
    """A source never gives one page: the deadline ends it, with the program and where it was."""
    program, said = printed(stage, hangs=0, deadline=1.0, shrinking=10.0)
    assert "hangs=0" in program
    assert "it hung for 1.0 s" in said
    assert 'File "<program>", line ' in said


def test_a_child_that_fails_fails_its_program(stage: Stage) -> None:
    """What a grandchild finds is told by all above it."""
    said = stage.run(
        "from machine import Machine\n\n"
        "with Machine(8, lies=5, readahead=0) as m:\n"
        "    a = m.region\n"
        "    if m.fork():\n"
        "        if m.fork():\n"
        "            a.touch(5)\n"
        "        a.unmap(5, 1)\n"
        "        m.exit()\n"
        "    a.unmap(5, 1)\n",
        10.0,
    )
    assert said is not None
    assert "byte 100: the memory holds" in said
    assert said.count("a forked child ended with 1") == 2
