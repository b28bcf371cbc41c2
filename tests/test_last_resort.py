"""`last_resort`: who waits for a page of memory that nobody serves, or touches one, is let go with SIGBUS."""

from __future__ import annotations

import errno
import os
import resource
from typing import Any

from aiouffd import RegisterMode
from aiouffd.pager.process.last_resort import Forsaken, LastResort
from aiouffd.testing import POISONED, FakeUffd

PAGE = 4096
BASE = 1 << 32


def forsaken(pages: int = 4, token: str = "a") -> tuple[FakeUffd, Any]:
    """Return a registered region and its space."""
    uffd: Any = FakeUffd()
    uffd.register(BASE, pages * PAGE, RegisterMode.MISSING)
    return uffd, Forsaken(uffd, PAGE, [(BASE, BASE + pages * PAGE)], token)


def test_who_touches_a_missing_page_is_poisoned() -> None:
    """Its thread goes on; that is seen before, also where this process has no descriptor left."""
    uffd, space = forsaken()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        resort = LastResort([space])
        assert not resort.attend()
        uffd.touch(BASE + PAGE, 7)
        assert resort.wait(0, 0) >= {uffd.fileno()}
        assert resort.wait(0) == {uffd.fileno()}  # the others are waited for once
        assert resort.attend()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert uffd.pages == {BASE + PAGE: POISONED}
    assert not uffd.asleep
    resort.close()


def test_who_waited_before_is_woken_and_faults_anew() -> None:
    """Its message was read by somebody who is dead."""
    uffd, space = forsaken()
    uffd.touch(BASE, 7)
    uffd.read()
    resort = LastResort([space])
    assert resort.attend()
    assert not uffd.asleep
    assert uffd.pages == {BASE: POISONED}
    resort.close()


def test_what_the_kernel_puts_off_is_tried_again() -> None:
    """EAGAIN: the layout is changing."""
    uffd, space = forsaken()
    resort = LastResort([space])
    uffd.touch(BASE, 7)
    uffd.failures.append(-errno.EAGAIN)
    assert resort.attend()
    assert len(resort.pending) == 1
    assert resort.attend()
    assert (resort.pending, uffd.pages) == ([], {BASE: POISONED})
    resort.close()


def test_a_space_that_is_forgotten_is_left_alone() -> None:
    """Also what was pending of it; others are attended to."""
    one, space = forsaken(token="a")
    other, another = forsaken(token="b")
    resort = LastResort([space, another])
    one.touch(BASE, 1)
    one.failures.append(-errno.EAGAIN)
    resort.attend()
    resort.forget("a")
    assert not resort.pending
    one.touch(BASE + PAGE, 2)
    other.touch(BASE, 3)
    assert resort.attend()
    assert not one.pages
    assert other.pages == {BASE: POISONED}
    resort.close()


def test_who_is_to_wait_waits() -> None:
    """For a missing page: what is protected against writes is let go all the same. So do children."""
    uffd, space = forsaken()
    space.on_error = "hold"
    uffd.touch(BASE, 7)
    uffd.read()
    resort = LastResort([space])  # wakes it, and it faults anew
    assert resort.attend()
    assert (uffd.pages, len(uffd.asleep), resort.pending) == ({}, 1, [])
    assert not resort.attend()  # it was read
    assert resort.outlook == "who touches a missing page waits from now on"
    resort.close()


def test_the_log_says_who_waits_and_who_does_not() -> None:
    """As their operators have chosen, each for his own."""
    _, poisoned = forsaken(token="a")
    _, held = forsaken(token="b")
    held.on_error = "hold"
    resort = LastResort([poisoned, held])
    parts = [
        "in 1 of 2 spaces pages that are touched are poisoned",
        "in 1 of 2 spaces who touches a missing page waits",
    ]
    assert resort.outlook == "; ".join(f"{part} from now on" for part in parts)
    resort.forget("b")
    assert resort.outlook == "pages that are touched are poisoned from now on"
    poisoned.on_error = "retry"
    assert "ended by their server" in resort.outlook
    resort.close()
