"""`engine.two_threads`: who does what, and what is left."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from aiouffd.engine import two_threads as module
from aiouffd.engine.runs import Op, Run
from aiouffd.engine.two_threads import TwoThreads, two_threads

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
PART = module._PART
BASE, SOURCE = 0x7F0000000000, 0x10000000

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor")


def run(at: int, parts: float) -> Run:
    """Return a run of so many parts."""
    return Run(Op.COPY, BASE + at * PART, at * PART, int(parts * PART), SOURCE + at * PART)


class Kernel:
    """Copies, and notes it. The first COPY of each of two threads waits for that of the other."""

    def __init__(self, answer: Callable[[int, int], int] = lambda _, length: length) -> None:
        self.calls: list[tuple[int, int, int, int]] = []
        self.threads: set[int] = set()
        self._answer = answer
        self._both = threading.Barrier(2, timeout=60)

    def copy(self, dst: int, src: int, length: int, mode: int) -> int:
        """Copy as the answer says."""
        if threading.get_ident() not in self.threads:
            self.threads.add(threading.get_ident())
            self._both.wait()
        self.calls.append((dst, src, length, mode))
        return self._answer(dst, length)


def alone(calls: list[int]) -> Callable[[int, int, int, int], int]:
    """Return a COPY that only this thread may call."""
    here = threading.get_ident()

    def copy(dst: int, _src: int, length: int, _mode: int) -> int:
        assert threading.get_ident() == here
        calls.append(dst)
        return length

    return copy


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_both_copy_and_each_part_once() -> None:
    """At the same time; where it ends, all of it is done. The runs stay as they are."""
    two, kernel = TwoThreads(), Kernel()
    runs = [run(0, 3.5), run(8, 1)]
    done, _ = two.copy(kernel.copy, runs, 5, PAGE)
    assert len(kernel.threads) == two.count == 2
    wanted = [(BASE + at * PART, SOURCE + at * PART, PART, 5) for at in (0, 1, 2, 8)]
    assert sorted(kernel.calls) == sorted([*wanted, (BASE + 3 * PART, SOURCE + 3 * PART, PART // 2, 5)])
    assert [(part.dst - BASE, part.left, came) for part, came in done] == [
        (PART, 0, PART),
        (2 * PART, 0, PART),
        (3 * PART, 0, PART),
        (3 * PART + PART // 2, 0, PART // 2),
        (9 * PART, 0, PART),
    ]
    assert [item.left for item in runs] == [3 * PART + PART // 2, PART]


def test_it_ends_when_both_have_ended() -> None:
    """Also where the other one takes longer: its descriptor and buffer are in use until then."""
    late, here = threading.Event(), threading.get_ident()
    kernel = Kernel(lambda _, length: length if threading.get_ident() == here or late.wait(60) else 0)
    timer = threading.Timer(0.05, late.set)
    timer.start()
    assert all(came == PART for _, came in TwoThreads().copy(kernel.copy, [run(0, 3)], 0, PAGE)[0])
    timer.join()


def test_an_interrupt_waits_for_the_other() -> None:
    """Ctrl-C in its own COPY, or while it waits: the other thread uses what would be closed."""
    begun, interrupted, ended = threading.Event(), threading.Event(), threading.Event()
    main = threading.get_ident()

    def copy(_dst: int, _src: int, length: int, _mode: int) -> int:
        if threading.get_ident() == main:
            assert begun.wait(60)
            interrupted.set()
            raise KeyboardInterrupt
        begun.set()
        assert interrupted.wait(60)
        time.sleep(0.05)  # what does not wait goes on meanwhile
        ended.set()
        return length

    with pytest.raises(KeyboardInterrupt):
        TwoThreads().copy(copy, [run(0, 2)], 0, PAGE)
    assert ended.is_set()

    class Ended:
        waits = 0

        def get(self) -> None:
            self.waits += 1
            if self.waits < 3:
                raise KeyboardInterrupt

    offer = module._Offer(lambda: None)
    offer.accepted.acquire()
    offer.ended = Ended()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        offer.has_helped()
    assert offer.ended.waits == 3  # type: ignore[attr-defined]


def test_other_work_is_done_beside() -> None:
    """While the loop does its own, which goes on when both are done."""
    begun, late, done = threading.Event(), threading.Event(), list[int]()

    def work() -> None:
        begun.set()
        assert late.wait(60)
        done.append(threading.get_ident())

    finish = TwoThreads().beside(work)
    assert begun.wait(60)
    timer = threading.Timer(0.05, late.set)
    timer.start()
    finish()
    timer.join()
    assert len(done) == 1
    assert done != [threading.get_ident()]


def test_the_loop_does_what_nobody_has_begun() -> None:
    """Once; the other thread finds it done."""
    two, done = TwoThreads(), list[int]()
    two._runs = True  # it has work of others
    two.beside(lambda: done.append(threading.get_ident()))()
    assert done == [threading.get_ident()]
    two._offers.put(module._Offer(lambda: done.append(1 // 0)))
    with pytest.raises(ZeroDivisionError):
        two._help(None)
    assert done == [threading.get_ident()]


def test_what_the_kernel_refuses_is_left() -> None:
    """All of a part, or the rest of it; the others come."""
    answers = {BASE: -11, BASE + 2 * PART: PAGE}
    done, _ = TwoThreads().copy(Kernel(answers.get).copy, [run(0, 4)], 0, PAGE)
    assert [(part.dst - BASE, part.src - SOURCE, part.left, came) for part, came in done] == [
        (0, 0, PART, 0),
        (2 * PART, 2 * PART, 0, PART),
        (2 * PART + PAGE, 2 * PART + PAGE, PART - PAGE, PAGE),
        (4 * PART, 4 * PART, 0, PART),
    ]


def test_parts_are_of_whole_pages() -> None:
    """Also where a page is larger than a part."""
    kernel = Kernel()
    TwoThreads().copy(kernel.copy, [run(0, 16)], 0, 4 * PART)
    assert sorted(call[0] - BASE for call in kernel.calls) == [0, 4 * PART, 8 * PART, 12 * PART]
    assert {call[2] for call in kernel.calls} == {4 * PART}


def test_what_is_left_off_where_others_wait() -> None:
    """One part is done at least, and parts are small then; here the other thread does not begin."""
    two, calls, answers = TwoThreads(), list[int](), iter([False, False, True])
    two._runs = True
    done, left = two.copy(alone(calls), [run(0, 2)], 0, PAGE, lambda: next(answers))
    assert [(part.dst - BASE, came) for part, came in done] == [
        (at, module.SHORT_PART) for at in (module.SHORT_PART, 2 * module.SHORT_PART)
    ]
    assert [(part.dst - BASE, part.left) for part in left] == [
        (at, module.SHORT_PART) for at in range(2 * module.SHORT_PART, 2 * PART, module.SHORT_PART)
    ]
    assert two.copy(alone(calls), [run(0, 4)], 0, PAGE, lambda: False)[1] == []


def test_where_the_other_does_not_begin_one_copies_all() -> None:
    """It may have work of others, or no processor; what it finds later is done already."""
    two, calls = TwoThreads(), list[int]()
    two._runs = True
    assert all(not part.left for part, _ in two.copy(alone(calls), [run(0, 4)], 0, PAGE)[0])
    assert len(calls) == 4
    assert two.count == 1
    two._offers.put(module._Offer(lambda: calls.append(BASE + 9 * PART)))
    two._offers.put(module._Offer(lambda: calls.append(1 // 0)))
    with pytest.raises(ZeroDivisionError):
        two._help(None)  # here: the first offer is not accepted, the second is done, the third fails
    assert calls[4:] == [BASE + 9 * PART]
    assert not two._runs


@pytest.mark.parametrize("why", ["one processor", "no thread", "one part"])
def test_without_another_thread(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """None is started where it would gain nothing; where none can be, all is copied all the same."""

    def start(_: object) -> None:
        assert why == "no thread"
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    if why == "one processor":
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    two, calls = TwoThreads(), list[int]()
    two.copy(alone(calls), [run(0, 1 if why == "one part" else 3)], 0, PAGE)
    assert len(calls) == (1 if why == "one part" else 3)
    assert (two.count, two._runs) == (1, False)


def test_the_thread_ends_when_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes again."""
    monkeypatch.setattr(module, "_IDLE", 0.001)
    two = TwoThreads()
    for _ in range(2):
        kernel = Kernel()
        two.copy(kernel.copy, [run(0, 4)], 0, PAGE)
        assert len(kernel.threads) == 2
        until(lambda: not two._runs)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_no_thread() -> None:
    """It starts one of its own when it needs it: what is offered to none would be kept for ever."""
    two_threads.copy(Kernel().copy, [run(0, 4)], 0, PAGE)
    assert two_threads._runs
    pid = os.fork()
    if pid == 0:
        os._exit(two_threads._runs)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
