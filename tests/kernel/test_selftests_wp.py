"""The cases of the kernel's own selftest of userfaultfd that are about write protection, across forks and pins.

The original pins through /sys/kernel/debug/gup_test, which kernels are seldom built with. Here a page is pinned as
programs do it: for long by a registered buffer of io_uring (FOLL_PIN | FOLL_LONGTERM, as gup_test; but for writing,
so it is pinned before it is protected), and in the child, for reading, by a write(2) with O_DIRECT. That either has
happened shows in the page's frame: a page that is pinned is copied at fork already, one that is shared with the
parent is copied when it is to be pinned.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import TYPE_CHECKING

import pytest
from faults import Pinned, frame, protected
from kinds import LARGE, SMALL, memory, on, pages_of, poke
from pattern import PAGE, peek
from reader import ReaderProcess, Resolver, in_child
from scenario import play

from aiouffd import Feature, RegisterMode, Userfaultfd
from aiouffd.kernel import libc

if TYPE_CHECKING:
    from pathlib import Path

MADV_PAGEOUT = 21

PROTECTION = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM

# wp-unpopulated


def wp_unpopulated(kind: str) -> None:
    """Scenario."""
    area = memory(kind, 4)
    page = area.address
    with ReaderProcess(Resolver(area)) as reader, Userfaultfd(Feature.WP_UNPOPULATED | PROTECTION) as uffd:
        uffd.register(page, area.length, RegisterMode.WP)
        reader.serve(uffd)
        uffd.writeprotect(page, PAGE, protect=True)
        assert protected(page)
        uffd.writeprotect(page, PAGE, protect=False)
        assert not protected(page)

        uffd.writeprotect(page, PAGE, protect=True)
        area.empty()
        assert not protected(page)  # MADV_DONTNEED takes the mark as well
        poke(page, b"mine")
        assert not protected(page)
        assert reader.seen() == {}

        area.empty()
        uffd.writeprotect(page, PAGE, protect=True)
        assert peek(page) == bytes(8)
        assert protected(page)  # the page of zeros has come protected
        assert reader.seen() == {}
        poke(page, b"mine")
        assert peek(page, 5) == b"mine\0"
        assert reader.seen() == {"wp": 1}

        uffd.writeprotect(page + PAGE, PAGE, protect=True)
        poke(page + PAGE, b"mine")  # a write is told, though nothing is there and MISSING is not asked for
        assert reader.seen() == {"wp": 2}
    with Userfaultfd(PROTECTION) as uffd:
        uffd.register(page, area.length, RegisterMode.WP)
        uffd.writeprotect(page + 2 * PAGE, PAGE, protect=True)
        assert not protected(page + 2 * PAGE)  # without the feature, what is not there is left out
        poke(page + 2 * PAGE, b"mine")


@on("wp-unpopulated", ["anonymous"])
def test_wp_unpopulated(kind: str) -> None:
    """Pages that are not there can be protected, keep that when they come, and lose it when they are dropped."""
    play(wp_unpopulated, kind)


# wp-fork, wp-fork-with-event


def wp_fork(kind: str, with_event: bool) -> None:
    """Scenario."""
    area = memory(kind, pages_of(kind))
    page, size = area.address, area.page_size
    features = PROTECTION | (Feature.EVENT_FORK if with_event else Feature(0))
    with ReaderProcess(Resolver(area)) as reader, Userfaultfd(features) as uffd:
        uffd.register(page, area.length, RegisterMode.WP)
        reader.serve(uffd)
        poke(page, b"old")
        uffd.writeprotect(page, size, protect=True)
        assert protected(page)

        def look() -> None:
            assert protected(page) == with_event
            assert peek(page, 3) == b"old"

        def look_and_write() -> None:
            look()
            poke(page, b"new")
            assert not protected(page)
            assert peek(page, 3) == b"new"

        in_child(look)
        if area.shared:
            libc.madvise(page, size, mmap.MADV_DONTNEED)  # which empties the entry, not the file
        else:
            with contextlib.suppress(OSError):  # huge pages cannot be swapped; nor can others, with no swap
                libc.madvise(page, size, MADV_PAGEOUT)
        assert protected(page)
        in_child(look)
        assert reader.seen() == ({"fork": 2} if with_event else {})
        in_child(look_and_write)
        assert reader.seen() == ({"fork": 3, "wp": 1} if with_event else {})
        assert protected(page)
        assert peek(page, 3) == (b"new" if area.shared else b"old")

        uffd.writeprotect(page, size, protect=False)
        assert not protected(page)
        poke(page, b"two")
        assert not protected(page)
        assert reader.seen() == ({"fork": 3, "wp": 1} if with_event else {})
        uffd.unregister(page, area.length)


@on("wp-fork", SMALL + LARGE)
def test_wp_fork(kind: str) -> None:
    """A child of which no event tells has nothing protected, whether its page was there or swapped out."""
    play(wp_fork, kind, False)


@on("wp-fork-with-event", SMALL + LARGE)
def test_wp_fork_with_event(kind: str) -> None:
    """A child of which an event tells is protected as its parent is; its write is told, and lifts only its own."""
    play(wp_fork, kind, True)


# wp-fork-pin, wp-fork-pin-with-event


def wp_fork_pin(kind: str, with_event: bool, directory: str) -> None:
    """Scenario."""
    area = memory(kind, pages_of(kind))
    page, size = area.address, area.page_size
    features = PROTECTION | (Feature.EVENT_FORK if with_event else Feature(0))
    with ReaderProcess(Resolver(area)) as reader, Userfaultfd(features) as uffd:
        uffd.register(page, size, RegisterMode.WP)
        reader.serve(uffd)
        poke(page, b"old")
        with Pinned(page, size):
            uffd.writeprotect(page, size, protect=True)
            here = frame(page)

            def was_copied_at_once() -> None:
                assert protected(page) == with_event
                assert peek(page, 3) == b"old"  # brings the entry of a shared page, which fork may leave out
                assert (frame(page) != here) == (not area.shared)
                assert protected(page) == with_event

            in_child(was_copied_at_once)
            assert frame(page) == here
            assert protected(page)

        def is_copied_when_pinned() -> None:
            assert peek(page, 3) == b"old"
            assert frame(page) == here
            assert protected(page) == with_event
            file = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT)
            assert os.writev(file, [memoryview(area.owner)[:size]]) == size
            assert (frame(page) != here) == (not area.shared)
            assert protected(page) == with_event
            assert peek(page, 3) == b"old"
            written = mmap.mmap(file, size, prot=mmap.PROT_READ)
            assert written[:] == b"old" + bytes(size - 3)

        in_child(is_copied_when_pinned)
        assert frame(page) == here
        assert protected(page)
        assert reader.seen() == ({"fork": 2} if with_event else {})
        uffd.unregister(page, size)


@pytest.fixture
def direct(tmp_path: Path) -> str:
    """A directory whose files can be written past the page cache, and a kernel that lets pin memory for long."""
    if os.geteuid():
        pytest.skip("frame numbers are shown to root only")
    area = memory("anonymous", 1)
    try:
        with Pinned(area.address, PAGE):
            os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP):
            pytest.skip(f"no io_uring, or no O_DIRECT in {tmp_path}: {error}")
        raise
    return str(tmp_path)


@on("wp-fork-pin", SMALL + LARGE)
def test_wp_fork_pin(kind: str, direct: str) -> None:
    """Neither a copy at fork, of a page pinned before, nor one for a pin in the child carries protection along."""
    play(wp_fork_pin, kind, False, direct)


@on("wp-fork-pin-with-event", SMALL + LARGE)
def test_wp_fork_pin_with_event(kind: str, direct: str) -> None:
    """Both copies do, where an event tells of the child."""
    play(wp_fork_pin, kind, True, direct)
