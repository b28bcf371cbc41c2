"""`monitor.beginnings`: a fork in one thread while another one enters a Monitor."""

from __future__ import annotations

import os
import threading

from pattern import PAGE, Pattern
from scenario import play

import aiouffd
from aiouffd.monitor.beginnings import Beginnings
from aiouffd.monitor.registration import Registration

SIZE = 1 << 20


def test_a_fork_waits_for_a_beginning_of_another_thread() -> None:
    """It goes on once the block is left; nobody begins until it is done."""
    beginnings, steps = Beginnings(), []
    begun, leave, forks = threading.Event(), threading.Event(), threading.Event()

    def enter() -> None:
        with beginnings.begin(children=True):
            begun.set()
            leave.wait()
            steps.append("left")

    def fork() -> None:
        forks.set()
        beginnings.before_fork()
        steps.append("forks")
        leave.set()
        beginnings.in_parent()

    threads = [threading.Thread(target=enter), threading.Thread(target=fork)]
    threads[0].start()
    begun.wait()
    threads[1].start()
    forks.wait()
    leave.set()
    for thread in threads:
        thread.join()
    assert steps == ["left", "forks"]


def test_a_fork_waits_for_nothing_of_its_own_thread() -> None:
    """A finalizer or signal handler may fork wherever it runs, and any thread where children are not served."""
    beginnings = Beginnings()
    with beginnings.begin(children=True):
        beginnings.before_fork()
        beginnings.in_child()

    def fork() -> None:
        beginnings.before_fork()
        beginnings.in_parent()

    with beginnings.begin(children=False):
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    fork()


def forked_while_entered() -> None:
    """Scenario: the region is registered, and its pager does not know of it yet, when another thread forks."""
    registered, forking = threading.Event(), threading.Event()
    entered = Registration.__init__

    def slow(self: Registration, *args: object, **options: object) -> None:
        entered(self, *args, **options)  # type: ignore[arg-type]
        registered.set()
        forking.wait()

    Registration.__init__ = slow  # type: ignore[method-assign]

    def fork() -> None:
        registered.wait()
        forking.set()
        child = os.fork()
        if not child:
            os._exit(0 if region[5 * PAGE] == 6 else 1)
        assert os.waitpid(child, 0)[1] == 0

    region = aiouffd.Region(SIZE)
    thread = threading.Thread(target=fork)
    thread.start()
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0):
        thread.join()
    print("left", flush=True)


def test_a_fork_while_a_monitor_is_entered() -> None:
    """The kernel has the fork wait, with the GIL held, until the pager reads of it: entering comes first."""
    assert play(forked_while_entered)[0] == "left\n"


def forks_while_it_enters() -> None:
    """Scenario: the thread that enters forks when the region is registered, and its pager does not know of it yet."""
    entered = Registration.__init__

    def forks(self: Registration, *args: object, **options: object) -> None:
        entered(self, *args, **options)  # type: ignore[arg-type]
        child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    Registration.__init__ = forks  # type: ignore[method-assign]
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0, fork="serve"):
        child = os.fork()
        if not child:
            os._exit(0 if region[5 * PAGE] == 6 else 1)
        assert os.waitpid(child, 0)[1] == 0
    print("left", flush=True)


def test_a_fork_of_the_thread_that_enters() -> None:
    """A signal handler or finalizer may fork there. Nobody would read of it, so that child does not get the region."""
    assert play(forks_while_it_enters)[0] == "left\n"
