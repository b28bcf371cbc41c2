"""`engine.arming`: write protection by the rule of Linux before 6.3, where a range has to be within one mapping."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest
from pattern import PAGE

from aiouffd.engine.arming import NEITHER, Arming
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.places import Places
from aiouffd.engine.resolver import Resolver
from aiouffd.engine.statistics import Counters
from aiouffd.errors import RangeGoneError

START = 1 << 20


class OldUffd:
    """Has mappings of some pages each, and keeps which pages are protected."""

    def __init__(self, *mappings: range) -> None:
        self.mappings = mappings
        self.protected = set[int]()
        self.refusal = 0
        self.tried = 0

    def try_writeprotect(self, start: int, length: int, mode: int) -> int:
        """Protect or lift, within one mapping."""
        self.tried += 1
        pages = range((start - START) // PAGE, (start + length - START) // PAGE)
        if self.refusal:
            return self.refusal
        if mode == NEITHER:
            return -errno.EINVAL
        if not any(pages[0] in mapping and pages[-1] in mapping for mapping in self.mappings):
            return -errno.ENOENT
        self.protected = self.protected | set(pages) if mode else self.protected - set(pages)
        return length

    def other(self, *_: int) -> int:
        """Do nothing else."""
        return 0

    try_wake = try_copy = try_zeropage = try_continue = try_poison = other


def arming(uffd: Any, modes: int | None = 1) -> Arming:
    """Return that of 64 pages."""
    mappings = Mappings([Mapping(START, START + 64 * PAGE, 0)])
    resolver = Resolver(uffd, PAGE, Counters())
    space = SimpleNamespace(uffd=uffd, mappings=mappings, resolver=resolver, page_size=PAGE, closing=False)
    return Arming([space], Places([(START, START + 64 * PAGE, 0)], ours=True), modes, lambda *_: None)


def test_a_range_of_several_mappings() -> None:
    """mprotect(2), madvise(2) or munmap(2) have split it: each part is protected, and lifted."""
    uffd = OldUffd(range(5), range(5, 6), range(9, 64))
    armed = arming(uffd)
    assert armed.protect(0, 64 * PAGE)
    assert uffd.protected == {*range(6), *range(9, 64)}
    assert uffd.tried < 40
    assert armed.lift(START + 2 * PAGE, START + 50 * PAGE)
    assert uffd.protected == {0, 1, *range(50, 64)}


def test_memory_that_another_process_has_not_registered() -> None:
    """One page of it is enough."""
    armed = arming(OldUffd(range(5), range(6, 64)), None)
    assert armed.protect(0, 5 * PAGE)
    with pytest.raises(RangeGoneError, match="UFFDIO_WRITEPROTECT"):
        armed.protect(0, 64 * PAGE)


def test_what_the_kernel_refuses() -> None:
    """A layout that is changing is told; a process that has ended writes no more."""
    uffd = OldUffd(range(64))
    armed = arming(uffd)
    changing = [armed.is_changing]
    uffd.refusal = -errno.EAGAIN
    assert not armed.protect(0, PAGE)
    assert not armed.lift(START, START + PAGE)
    assert [*changing, armed.is_changing] == [False, True]
    uffd.refusal = -errno.ESRCH
    assert armed.protect(0, PAGE)
    uffd.refusal = -errno.ENOMEM
    with pytest.raises(OSError, match="UFFDIO_WRITEPROTECT"):
        armed.protect(0, PAGE)
    armed.spaces[0].closing = True
    assert armed.protect(0, PAGE)
