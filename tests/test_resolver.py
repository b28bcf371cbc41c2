"""`engine.resolver` against a scripted kernel: every answer, in any order, ends as it should."""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.resolver import Resolver
from aiouffd.engine.runs import Op, Purpose, Run, merge
from aiouffd.engine.statistics import Counter, Counters
from aiouffd.kernel import abi
from aiouffd.kernel.userfaultfd import Copied, copy_missing

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

PAGE = 4096
BASE = 0x10000000


class Kernel:
    """Pages of one mapping (or several), and a script of refusals for the next calls."""

    def __init__(self, mapped: list[tuple[int, int]], present: set[int], script: list[int]) -> None:
        self.mapped = mapped
        self.content: dict[int, int] = dict.fromkeys(present, -1)
        self.script = script
        self.woken: set[int] = set()
        self.calls = 0

    def fill(self, start: int, source: int, length: int, mode: int) -> int:
        """Do as UFFDIO_COPY does."""
        self.calls += 1
        pages = range(start // PAGE, (start + length) // PAGE)
        if self.script:
            scripted = self.script.pop(0)
            if scripted < 0:
                return scripted
            pages = pages[:scripted] if scripted else pages
        if not any(low <= pages[0] and pages[-1] < high for low, high in self.mapped):
            return -errno.ENOENT
        done = 0
        for page in pages:
            if page in self.content:
                break
            self.content[page] = source + done
            if not mode & 1:
                self.woken.add(page)
            done += PAGE
        return done or -errno.EEXIST

    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int:
        """UFFDIO_COPY."""
        return self.fill(dst, src, length, mode)

    def try_copy_missing(self, dst: int, src: int, length: int, mode: int, page: int) -> Copied:
        """Several, as a descriptor does them."""
        return copy_missing(self.try_copy, dst, src, length, mode, page)

    def try_zeropage(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_ZEROPAGE."""
        return self.fill(start, 0, length, mode)

    try_continue = try_poison = try_writeprotect = try_zeropage

    def try_writeprotects(self, ranges: array[int]) -> int:
        """The kernel knows no such call."""
        raise NotImplementedError

    def try_wake(self, start: int, length: int) -> int:
        """UFFDIO_WAKE."""
        self.woken.update(range(start // PAGE, (start + length) // PAGE))
        return length


FIRST = BASE // PAGE


@given(
    st.integers(1, 40),
    st.sets(st.integers(0, 39)),
    st.lists(st.integers(1, 39), unique=True, max_size=4),
    st.sets(st.integers(0, 39), max_size=10),
    st.lists(st.sampled_from([-errno.EAGAIN, -errno.EEXIST, -errno.ENOENT, 0, 1, 2, 5]), max_size=12),
    st.booleans(),
    st.sampled_from([Op.COPY, Op.ZEROPAGE, Op.CONTINUE, Op.POISON]),
)
def test_a_run_ends_with_every_page_right_and_woken(
    count: int, present: set[int], cuts: list[int], unmapped: set[int], script: list[int], wake: bool, op: int
) -> None:
    """Whatever the kernel answers: each mapped page has its own bytes, nothing present is touched, all are woken."""
    edges = sorted({0, 40, *cuts})
    mapped = [(FIRST + low, FIRST + high) for low, high in itertools.pairwise(edges)]
    mapped = [(low, high) for low, high in mapped if low - FIRST not in unmapped]
    lies = any(answer in (-errno.EEXIST, -errno.ENOENT) for answer in script)
    kernel = Kernel(mapped, {FIRST + page for page in present}, list(script))
    resolver = Resolver(kernel, PAGE, Counters())
    first = 1 << 20 if op == Op.COPY else 0  # the others have no source
    run = Run(op, BASE, 0, count * PAGE, first)
    for _ in range(1000):
        result = resolver.resolve(run, wake=wake)
        assert result in (0, -errno.EAGAIN)
        if result == 0:
            break
    else:
        raise AssertionError("the run never ended")
    assert run.left == 0
    for page in range(FIRST, FIRST + count):
        covered = any(low <= page < high for low, high in mapped)
        if page - FIRST in present:
            assert kernel.content[page] == -1
        elif covered and not lies:
            # One without a source tells how far into its call the page was; how the run was cut is the kernel's.
            assert op != Op.COPY or kernel.content[page] == first + (page - FIRST) * PAGE
            assert page in kernel.content
        elif not covered:
            assert page not in kernel.content
        if wake:
            assert page in kernel.woken
    assert kernel.calls < 60 + len(script) + 14 * count


def test_other_refusals_are_told_with_the_run_where_it_stopped() -> None:
    """ENOMEM and EFAULT are the owner's: what came before is done, the run stands at the page that failed."""
    for number in (errno.ENOMEM, errno.EFAULT, errno.EINVAL):
        kernel = Kernel([(FIRST, FIRST + 8)], set(), [2, -number])
        run = Run(Op.COPY, BASE, 0, 8 * PAGE, 1 << 20)
        assert Resolver(kernel, PAGE, Counters()).resolve(run, wake=True) == -number
        assert (run.dst, run.src, run.offset, run.left) == (BASE + 2 * PAGE, (1 << 20) + 2 * PAGE, 2 * PAGE, 6 * PAGE)


REFUSALS = {errno.ENOMEM, errno.EFAULT, errno.EINVAL, errno.EBUSY, errno.EPERM, errno.EIO}
ANSWERS = sorted(REFUSALS | {errno.EAGAIN, errno.EEXIST, errno.ENOENT, errno.ESRCH, errno.ENOSPC})


@given(st.lists(st.sampled_from(ANSWERS), max_size=12), st.integers(0, 5), st.booleans())
def test_every_operation_gives_every_answer(script: list[int], op: int, wake: bool) -> None:
    """Each operation, each errno of userfaultfd(2), in any order: resolved, put off, over, or the owner's to decide."""
    kernel = Kernel([(FIRST, FIRST + 8)], set(), [-number for number in script])
    resolver = Resolver(kernel, PAGE, Counters())
    run = Run(op, BASE, 0, 8 * PAGE, 1 << 20)
    for _ in range(200):
        before = list(kernel.script)
        result = resolver.resolve(run, wake=wake)
        last = -before[len(before) - len(kernel.script) - 1] if len(kernel.script) < len(before) else 0
        if result == 0:
            assert run.left == 0
            return
        if result == -errno.ESRCH:
            assert last in (errno.ESRCH, errno.ENOSPC)
            return
        if result != -errno.EAGAIN:
            assert -result in REFUSALS
            assert -result == last
            assert (op, -result) != (Op.CONTINUE, errno.EFAULT)
    raise AssertionError("the run never ended")


def test_a_dead_target_is_esrch_under_both_names() -> None:
    """Linux 4.11 and 4.12 said ENOSPC."""
    for number in (errno.ESRCH, errno.ENOSPC):
        kernel = Kernel([(FIRST, FIRST + 8)], set(), [-number])
        assert Resolver(kernel, PAGE, Counters()).resolve(Run(Op.ZEROPAGE, BASE, 0, PAGE), wake=True) == -errno.ESRCH


def test_counters_tell_what_the_kernel_answered() -> None:
    """EAGAIN, EEXIST, ENOENT, partial copies, copies and wakes are each counted."""
    counters = Counters()
    kernel = Kernel([(FIRST, FIRST + 8)], {FIRST}, [])
    run = Run(Op.COPY, BASE, 0, 10 * PAGE, 0)
    kernel.script = [-errno.EAGAIN]
    resolver = Resolver(kernel, PAGE, counters)
    resolver.resolve(run, wake=True)
    resolver.resolve(run, wake=True)
    seen = counters.snapshot()
    assert seen.eagain == 1
    assert seen.enoent >= 2
    assert seen.copies == kernel.calls
    assert seen.wakes >= 3


class Scripted:
    """Gives the next answer, whatever it is asked; notes what."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[object, ...]] = []

    def try_copy_missing(self, *arguments: int) -> Copied:
        """It gives the next answers to each of its COPYs."""
        return copy_missing(self.try_copy, *arguments)

    def __getattr__(self, name: str) -> Callable[..., int]:
        def ask(*arguments: int) -> int:
            self.asked.append((name.removeprefix("try_"), (arguments[0] - BASE) // PAGE, *arguments[1:]))
            return 0 if name == "try_wake" else self.answers.pop(0)

        return ask


@pytest.mark.parametrize("wake", [True, False])
def test_how_a_run_is_worked_off(wake: bool) -> None:
    """Behind a part that came; past what is present; in halves where no mapping covers it, and in one piece again."""
    counters, source = Counters(), 1 << 20
    kernel: Any = Scripted(
        *(2 * PAGE, -errno.EEXIST, -errno.ENOENT, 2 * PAGE, -errno.ENOENT, -errno.ENOENT, PAGE, PAGE)
    )
    resolver = Resolver(kernel, PAGE, counters, 2)
    counters.words[Counter.PAGES_PREFETCH] = 10
    counters.words[Counter.BYTES_FETCHED] = 10 * PAGE
    run = Run(Op.COPY, BASE, 0, 8 * PAGE, source, purpose=Purpose(Counter.PAGES_PREFETCH))
    assert resolver.resolve(run, wake=wake) == 0
    mode = 2 if wake else 3

    def copy(page: int, count: int) -> tuple[object, ...]:
        return "copy", page, source + page * PAGE, count * PAGE, mode

    assert kernel.asked == [
        *(copy(0, 8), copy(2, 6), copy(3, 5)),
        *([("wake", 2, PAGE)] if wake else []),
        *(copy(3, 2), copy(5, 3), copy(5, 1), ("wake", 5, PAGE), copy(6, 1), copy(7, 1)),
    ]
    found = counters.snapshot()
    assert (found.copies, found.partial, found.eexist, found.enoent, found.wakes) == (8, 1, 1, 3, 1 + wake)
    assert (found.pages_prefetch, found.bytes_fetched) == (8, 8 * PAGE)


@pytest.mark.parametrize("wake", [True, False])
def test_what_is_there_is_passed_and_woken_once(wake: bool) -> None:
    """Where every other page is there: one call for all that is missing, and one WAKE for all that is not."""
    counters, calls = Counters(), list[tuple[str, int, int]]()

    class Noting(Kernel):
        """Notes what it is asked for."""

        def try_copy_missing(self, dst: int, src: int, length: int, mode: int, page: int) -> Copied:
            calls.append(("copy", dst, length))
            return super().try_copy_missing(dst, src, length, mode, page)

        def try_wake(self, start: int, length: int) -> int:
            calls.append(("wake", start, length))
            return super().try_wake(start, length)

    kernel = Noting([(FIRST, FIRST + 12)], {FIRST + page for page in (1, 3, 5, 6, 9)}, [])
    counters.words[Counter.PAGES_PREFETCH] = 12
    run = Run(Op.COPY, BASE, 0, 12 * PAGE, 1 << 20, purpose=Purpose(Counter.PAGES_PREFETCH))
    assert Resolver(kernel, PAGE, counters).resolve(run, wake=wake) == 0
    assert calls == [("copy", BASE + PAGE, 11 * PAGE), *([("wake", BASE + PAGE, 9 * PAGE)] if wake else [])]
    found = counters.snapshot()
    assert (found.copies, found.eexist, found.wakes, found.pages_prefetch) == (kernel.calls, 5, wake, 7)
    assert set(kernel.content) == {FIRST + page for page in range(12)}


def test_the_modes_of_each_operation() -> None:
    """Of 2, what protects new pages is for COPY and CONTINUE; protecting wakes nobody."""
    for op, name, modes in (
        (Op.COPY, "copy", (2, 3)),
        (Op.ZEROPAGE, "zeropage", (0, 1)),
        (Op.CONTINUE, "continue", (2, 3)),
        (Op.POISON, "poison", (0, 1)),
        (Op.UNPROTECT, "writeprotect", (0, abi.WRITEPROTECT_MODE_DONTWAKE)),
        (Op.PROTECT, "writeprotect", (abi.WRITEPROTECT_MODE_WP, abi.WRITEPROTECT_MODE_WP)),
    ):
        for wake, mode in zip((True, False), modes, strict=True):
            kernel: Any = Scripted(PAGE)
            counters = Counters()
            assert Resolver(kernel, PAGE, counters, 2).resolve(Run(op, BASE, 0, PAGE, 8), wake=wake) == 0
            assert kernel.asked == [(name, 0, *((8,) if op == Op.COPY else ()), PAGE, mode)]
            word = ("COPIES", "ZEROPAGES", "CONTINUES", "POISONS", "UNPROTECTS", "PROTECTS")[op]
            assert list(counters.words).count(1) == counters.words[Counter[word]] == 1


def test_what_was_not_brought_is_taken_back_once() -> None:
    """Pages of its cause, zeros among them, and bytes of the source's own memory; nothing of what fills none."""
    for op, owner, zeros, fetched in (
        (Op.COPY, None, 0, 2 * PAGE),
        (Op.COPY, b"", 0, 0),
        (Op.ZEROPAGE, None, 2, 0),
        (Op.CONTINUE, None, 0, 0),
        (Op.POISON, None, None, None),
    ):
        counters = Counters()
        for word in (Counter.PAGES_REPLAY, Counter.PAGES_ZERO, Counter.BYTES_FETCHED):
            counters.words[word] = 10 * PAGE
        kernel: Any = Scripted()
        run = Run(op, BASE, 0, 4 * PAGE, 8, owner, Purpose(Counter.PAGES_REPLAY))
        Resolver(kernel, PAGE, counters).uncount(run, 2 * PAGE)
        found = counters.snapshot()
        taken = [10 * PAGE - count for count in (found.pages_replay, found.pages_zero, found.bytes_fetched)]
        assert taken == ([0, 0, 0] if zeros is None else [2, zeros, fetched])


def test_merge_joins_what_continues_in_target_source_and_offset() -> None:
    """Runs are sorted; two become one only where memory, source and offset all go on."""
    owner = object()
    runs = [
        Run(Op.COPY, BASE + 2 * PAGE, 2 * PAGE, PAGE, 0x5000, owner),
        Run(Op.COPY, BASE, 0, PAGE, 0x3000, owner),
        Run(Op.COPY, BASE + PAGE, PAGE, PAGE, 0x4000, owner),
        Run(Op.COPY, BASE + 3 * PAGE, 3 * PAGE, PAGE, 0x6000, object()),
        Run(Op.ZEROPAGE, BASE + 5 * PAGE, -1, PAGE),
        Run(Op.ZEROPAGE, BASE + 6 * PAGE, -1, PAGE),
        Run(Op.ZEROPAGE, BASE + 7 * PAGE, 9 * PAGE, PAGE),
    ]
    merged = merge(runs)
    assert [(run.op, run.dst - BASE, run.left // PAGE) for run in merged] == [
        (Op.COPY, 0, 3),
        (Op.COPY, 3 * PAGE, 1),
        (Op.ZEROPAGE, 5 * PAGE, 2),
        (Op.ZEROPAGE, 7 * PAGE, 1),
    ]


class Wide:
    """Wakes what is below 1 << bits, and counts how often it is asked."""

    def __init__(self, bits: int) -> None:
        self.bits, self.asked, self.woken = bits, 0, 0

    def try_wake(self, start: int, length: int) -> int:
        """Do as UFFDIO_WAKE does."""
        self.asked += 1
        if start + length > 1 << self.bits:
            return -errno.EINVAL
        self.woken = max(self.woken, start + length)
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        """Nothing else is asked."""
        return lambda *_: -errno.EINVAL


@given(st.lists(st.integers(31, 57), min_size=1))
def test_all_sleepers_are_woken_wherever_addresses_end(widths: list[int]) -> None:
    """Also where a process before had another width; where it had the same, that and the next are asked for."""
    for bits in widths:
        for _ in range(2):
            kernel: Any = Wide(bits)
            Resolver(kernel, PAGE, Counters()).wake_all(PAGE)
            assert kernel.woken == (1 << bits) - PAGE
        assert kernel.asked <= 2
