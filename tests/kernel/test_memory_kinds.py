"""What works on memory of each kind, and what the kernel refuses and how: one table, proven row by row.

And what unmaps registered memory without being asked for by munmap(2), and what empties it without a word.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import threading
from typing import TYPE_CHECKING

import attrs
import pytest
from faults import protected
from kinds import HUGE, MAKERS, MAP_HUGETLB, MAP_NORESERVE, Memory, map_at, memory, place, poke
from pattern import PAGE, content, peek
from reader import ReaderProcess, Resolver
from scenario import play

import aiouffd
from aiouffd import Feature, Ioctl, RegisterMode, Remap, Remove, Unmap, Userfaultfd
from aiouffd.kernel import abi, libc
from aiouffd.kernel.memory import address_of
from aiouffd.kernel.pagemap import Pagemap

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd import Event

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

OK = "ok"

ALWAYS = Ioctl.WAKE | Ioctl.COPY | Ioctl.POISON
SMALL_PAGES = ALWAYS | Ioctl.ZEROPAGE | Ioctl.MOVE


@attrs.frozen
class Row:
    """What is expected: `OK`, or the errno's name.

    Attributes:
        missing: REGISTER in mode MISSING.
        minor: REGISTER in mode MINOR.
        ioctls: in the reply, beside those of WP and MINOR.
        copy: COPY, whole pages; protected as well, where WP is registered.
        zeropage: ZEROPAGE.
        poison: POISON.
        hole: CONTINUE of what the file has not (EINVAL: memory without a file).
        filled: CONTINUE of what the file has; empty: there is no file to write to.
        protect: WRITEPROTECT.
        move: MOVE from memory of the same kind.
    """

    missing: str = OK
    minor: str = OK
    ioctls: Ioctl = SMALL_PAGES
    copy: str = OK
    zeropage: str = OK
    poison: str = OK
    hole: str = "EFAULT"
    filled: str = OK
    protect: str = OK
    move: str = "EINVAL"


ANON = Row(minor="EINVAL", hole="EINVAL", filled="", move=OK)
SHMEM = Row()
HUGETLB = Row(ioctls=ALWAYS, zeropage="EINVAL")
NO = "EINVAL"
REFUSED = Row(NO, NO, Ioctl(0), copy=NO, zeropage=NO, poison=NO, hole=NO, filled=NO, protect=NO, move=NO)

TABLE = {
    "anonymous": ANON,
    "anonymous-shared": SHMEM,
    "shmem": SHMEM,
    "shmem-private": SHMEM,
    "tmpfs": SHMEM,
    "tmpfs-private": SHMEM,
    "dev-zero": SHMEM,
    # Anonymous memory to the kernel, but with a file of length 0, and nothing can be put behind the end of a file.
    "dev-zero-private": attrs.evolve(ANON, copy="EFAULT", zeropage="EFAULT", poison="EFAULT"),
    "system-v": REFUSED,
    "disk": REFUSED,
    "disk-private": REFUSED,
    "hugetlb": HUGETLB,
    "hugetlb-private": attrs.evolve(HUGETLB, filled=""),
    "hugetlb-memfd-private": HUGETLB,
}


def name(call: Callable[[], object]) -> str:
    """Return `OK` or the errno's name of what a call raised."""
    try:
        call()
    except aiouffd.OperationError as error:
        return errno.errorcode[error.errno or 0]
    return OK


class Trial:
    """One page of a kind, registered anew for each operation."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.size = memory(kind, 1).page_size

    def __call__(
        self,
        mode: RegisterMode,
        operation: Callable[[Userfaultfd, Memory], object],
        after: Callable[[Memory], object] = lambda _: None,
        before: Callable[[Memory], object] = lambda _: None,
    ) -> str:
        """Return how an operation ends; where it was not refused, `after` looks at the memory."""
        area = memory(self.kind, 1)
        with Userfaultfd(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED) as uffd:
            result = name(lambda: uffd.register(area.address, area.length, mode))
            if result == OK:
                before(area)
                result = name(lambda: operation(uffd, area))
                if result == OK:
                    after(area)
        return result


def through_the_file(area: Memory) -> None:
    """Write a page into the file behind private or shared memory; the mapping itself is not touched."""
    other = mmap.mmap(area.fd, area.length) if area.fd >= 0 else None
    poke(area.alias() if other is None else address_of(other), b"file")


def is_content(area: Memory) -> None:
    """Expect what was copied."""
    assert area.read(0) == content(0, area.page_size)


def each_operation(kind: str) -> None:
    """Scenario."""
    trial, row = Trial(kind), TABLE[kind]
    size = trial.size
    data = content(0, size)

    def copy(uffd: Userfaultfd, area: Memory) -> None:
        assert uffd.copy(area.address, data) == size
        with pytest.raises(aiouffd.PagePresentError):
            uffd.copy(area.address, data)

    def move(uffd: Userfaultfd, area: Memory) -> None:
        source = memory(kind, 1)
        poke(source.address, data)
        assert uffd.move(area.address, source.address, size) == size
        assert source.read(0) == bytes(size)

    def is_protected(area: Memory) -> None:
        is_content(area)
        assert protected(area.address)

    found = Row(
        missing=trial(MISSING, lambda uffd, area: uffd.unregister(area.address, area.length)),
        minor=trial(MINOR, lambda uffd, area: uffd.unregister(area.address, area.length)),
        ioctls=row.ioctls,
        copy=trial(MISSING, copy, is_content),
        zeropage=trial(MISSING, lambda u, a: u.zeropage(a.address, size), lambda a: same(a.read(0), bytes(size))),
        poison=trial(MISSING, lambda uffd, area: uffd.poison(area.address, size)),
        hole=trial(MISSING | row_minor(row), lambda uffd, area: uffd.continue_(area.address, size)),
        filled=row.filled
        and trial(
            MISSING | row_minor(row),
            lambda uffd, area: uffd.continue_(area.address, size),
            lambda area: same(peek(area.address, 4), b"file"),
            through_the_file if row.missing == OK else lambda _: None,
        ),
        protect=trial(
            WP, lambda u, a: u.writeprotect(a.address, size, protect=True), lambda a: same(protected(a.address), True)
        ),
        move=trial(MISSING, move, is_content),
    )
    assert found == row
    if row.missing != OK:
        return

    def protected_copy(uffd: Userfaultfd, area: Memory) -> int:
        return uffd.copy(area.address, data, write_protect=True)

    assert trial(MISSING | WP, protected_copy, is_protected) == row.copy
    assert trial(MISSING, protected_copy) == "EINVAL"  # of what is not registered with WP nothing can be protected
    assert trial(MISSING, lambda uffd, area: uffd.writeprotect(area.address, size, protect=True)) == "ENOENT"
    assert trial(WP, lambda uffd, area: uffd.copy(area.address, data), is_content) == row.copy  # WP alone is enough
    if size > PAGE:
        assert trial(MISSING, lambda uffd, area: uffd.copy(area.address, content(0, PAGE))) == "EINVAL"
        assert trial(MISSING, lambda uffd, area: uffd.poison(area.address + PAGE, PAGE)) == "EINVAL"


def row_minor(row: Row) -> RegisterMode:
    """Return MINOR where the kind has it."""
    return MINOR if row.minor == OK else RegisterMode(0)


def same(left: object, right: object) -> None:
    """Expect that."""
    assert left == right


def ioctls_of(kind: str) -> None:
    """Scenario: the reply of REGISTER in every mode."""
    row = TABLE[kind]
    area = memory(kind, 1)
    for bits in range(1, 8):
        mode = RegisterMode(bits)
        with Userfaultfd() as uffd:
            refused = row.missing != OK or (row.minor != OK and mode & MINOR)
            if refused:
                with pytest.raises(aiouffd.OperationError, match="EINVAL"):
                    uffd.register(area.address, area.length, mode)
                continue
            extra = (Ioctl.WRITEPROTECT if mode & WP else 0) | (Ioctl.CONTINUE if mode & MINOR else 0)
            assert uffd.register(area.address, area.length, mode) == row.ioctls | extra


@pytest.mark.parametrize("kind", list(TABLE), indirect=True)
def test_each_operation_on_each_kind(kind: str) -> None:
    """Registered, copied, zeroed, poisoned, continued, protected, moved: done, with the bytes to see, or the errno."""
    play(each_operation, kind)


@pytest.mark.parametrize("kind", list(TABLE), indirect=True)
def test_the_reply_of_register(kind: str) -> None:
    """Which operations the kernel says that it has, in each mode."""
    play(ioctls_of, kind)


def test_the_table_is_whole() -> None:
    """Every kind that can be made has a row."""
    assert set(TABLE) == set(MAKERS)


def tracked(kind: str) -> None:
    """Scenario."""
    area = memory(kind, 4)
    for page in area.addresses():
        poke(page, b"old")
    with Userfaultfd(Feature.WP_ASYNC) as uffd:
        for mode in (MISSING, MINOR, MISSING | WP):
            if TABLE[kind].missing != OK:
                with pytest.raises(aiouffd.OperationError, match="EINVAL"):
                    uffd.register(area.address, area.length, mode)
        assert uffd.register(area.address, area.length, WP) & Ioctl.WRITEPROTECT
        flags = abi.PM_SCAN_WP_MATCHING | abi.PM_SCAN_CHECK_WPASYNC
        Pagemap().scan(area.address, area.length, mask=abi.PAGE_IS_WRITTEN, flags=flags)
        poke(area.page(2), b"new")
        assert area.read(1)[:3] == b"old"
        written = Pagemap().scan(area.address, area.length, mask=abi.PAGE_IS_WRITTEN, flags=flags)
        assert written == [aiouffd.Range(area.page(2), area.page_size)]
        assert uffd.read() == []


@pytest.mark.parametrize("kind", [kind for kind in TABLE if not kind.startswith("hugetlb")], indirect=True)
def test_asynchronous_protection_takes_any_memory(kind: str) -> None:
    """With WP_ASYNC even files on disk and System V memory may be registered, for WP: written pages are found."""
    play(tracked, kind)


def test_what_may_not_be_written_may_not_be_registered() -> None:
    """EPERM: a file that was opened to be read, mapped shared; mapped private, it is a copy and is fine."""
    area = memory("tmpfs", 1)
    fd = os.open(f"/proc/self/fd/{area.fd}", os.O_RDONLY | os.O_CLOEXEC)
    with Userfaultfd() as uffd:
        shared = mmap.mmap(fd, PAGE, prot=mmap.PROT_READ)
        with pytest.raises(aiouffd.OperationError, match=r"EPERM.*write"):
            uffd.register(address_of(shared), PAGE, MISSING)
        private = mmap.mmap(fd, PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        uffd.register(address_of(private), PAGE, MISSING)
        assert uffd.copy(address_of(private), content(0, PAGE)) == PAGE
        assert private[:] == content(0, PAGE)
    os.close(fd)


# Unmapped implicitly


def told(uffd: Userfaultfd, change: Callable[[], object]) -> list[Event]:
    """Make a change in a thread, and return what is told of it: who makes it sleeps until that is read."""
    thread = threading.Thread(target=change)
    thread.start()
    seen: list[Event] = []
    while thread.is_alive():
        if select.select([uffd], [], [], 0.001)[0]:
            seen += uffd.read()
    thread.join()
    return seen + uffd.read()


EVENTS = Feature.EVENT_UNMAP | Feature.EVENT_REMAP | Feature.EVENT_REMOVE
FIXED = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED


class Site:
    """Eight pages at a place of their own, registered, with as much of nobody's before and behind them."""

    pages = 8

    def __init__(self, kind: str, uffd: Userfaultfd) -> None:
        self.kind, self.uffd = kind, uffd
        self.size = HUGE if kind.startswith("hugetlb") else PAGE
        self.length = self.pages * self.size
        self.start = place(3 * self.length) + self.length
        self.end = self.start + self.length

    def map(self) -> None:
        """Map and register it, anew."""
        if self.kind == "shmem":
            fd = os.memfd_create("site")
            os.ftruncate(fd, self.length)
            map_at(self.start, self.length, mmap.MAP_SHARED, fd)
            os.close(fd)
        else:
            huge = MAP_HUGETLB | MAP_NORESERVE if self.size == HUGE else 0
            map_at(self.start, self.length, ANONYMOUS | huge)
        self.uffd.register(self.start, self.length, MISSING)

    def page(self, number: int) -> int:
        """Return the address of a page."""
        return self.start + number * self.size


def mapped_over(kind: str) -> None:
    """Scenario."""
    with Userfaultfd(EVENTS) as uffd:
        site = Site(kind, uffd)
        size = site.size
        site.map()
        assert uffd.copy(site.page(2), content(0, size)) == size
        assert told(uffd, lambda: map_at(site.page(2), 2 * size, ANONYMOUS)) == [Unmap(site.page(2), site.page(4))]
        assert peek(site.page(2)) == bytes(8)  # it is another's now, and no fault
        with pytest.raises(aiouffd.RangeGoneError):
            uffd.copy(site.page(3), content(0, size))
        for number in (1, 4):
            assert uffd.copy(site.page(number), content(0, size)) == size  # what is left is served
            assert peek(site.page(number), size) == content(0, size)
        # Both parts, and what is between them, before and behind, which was never ours: in one message.
        assert told(uffd, lambda: map_at(site.start - PAGE, site.length + 2 * PAGE, ANONYMOUS)) == [
            Unmap(site.start - PAGE, site.end + PAGE)
        ]
        assert peek(site.page(1)) == bytes(8)


@pytest.mark.parametrize("kind", ["anonymous", "shmem"], indirect=True)
def test_mapping_over_it_is_an_unmap(kind: str) -> None:
    """mmap(MAP_FIXED) tells of the range that it was given: more than what was registered, where that is larger."""
    play(mapped_over, kind)


@pytest.mark.parametrize("kind", ["hugetlb-private"], indirect=True)
def test_mapping_over_huge_pages_is_an_unmap(kind: str) -> None:
    """It is told in the same way, by whole huge pages."""
    play(mapped_over_huge_pages, kind)


def mapped_over_huge_pages(kind: str) -> None:
    """Scenario."""
    with Userfaultfd(EVENTS) as uffd:
        site = Site(kind, uffd)
        site.map()
        assert uffd.copy(site.page(0), content(0, HUGE)) == HUGE
        with pytest.raises(OSError, match="Invalid"):  # a part of a huge page stays where it is
            map_at(site.page(1) + PAGE, PAGE, ANONYMOUS)
        assert told(uffd, lambda: map_at(site.page(0), HUGE, ANONYMOUS)) == [Unmap(site.page(0), site.page(1))]
        assert peek(site.page(0)) == bytes(8)


def moved_onto(kind: str) -> None:
    """Scenario."""
    with Userfaultfd(EVENTS) as uffd:
        site = Site(kind, uffd)
        site.map()
        other = place(4 * PAGE)
        map_at(other, 4 * PAGE, ANONYMOUS)
        poke(other, content(0, 4 * PAGE))
        moves = told(uffd, lambda: libc.mremap(other, 4 * PAGE, 4 * PAGE, FIXED, site.page(2)))
        assert moves == [Unmap(site.page(2), site.page(6))]  # and no REMAP: what was moved is not registered
        assert peek(site.page(2), 4 * PAGE) == content(0, 4 * PAGE)
        with pytest.raises(aiouffd.RangeGoneError):
            uffd.copy(site.page(2), content(0, PAGE))

        assert told(uffd, site.map) == [Unmap(site.start, site.end)]  # registered parts of it were left
        assert told(uffd, lambda: libc.mremap(site.page(0), PAGE, PAGE, FIXED, site.page(5))) == [
            Unmap(site.page(5), site.page(6)),
            Remap(site.page(0), site.page(5), PAGE),
            Unmap(site.page(0), site.page(1)),
        ]
        assert uffd.copy(site.page(5), content(0, PAGE)) == PAGE
        with pytest.raises(aiouffd.RangeGoneError):
            uffd.copy(site.page(0), content(0, PAGE))

        assert told(uffd, site.map) == [Unmap(site.start, site.end)]
        assert told(uffd, lambda: libc.mremap(site.page(0), 2 * PAGE, PAGE, FIXED, site.page(5))) == [
            Unmap(site.page(5), site.page(6)),
            Remap(site.page(0), site.page(5), PAGE),
            Unmap(site.page(1), site.page(2)),  # what it has shrunk by
            Unmap(site.page(0), site.page(1)),
        ]
        assert told(uffd, site.map) == [Unmap(site.start, site.end)]
        assert told(uffd, lambda: libc.mremap(site.start, site.length, PAGE, 0)) == [Unmap(site.page(1), site.end)]
        assert uffd.copy(site.page(0), content(0, PAGE)) == PAGE
        with pytest.raises(aiouffd.RangeGoneError):
            uffd.copy(site.page(1), content(0, PAGE))


@pytest.mark.parametrize("kind", ["anonymous", "shmem"], indirect=True)
def test_moving_onto_it_and_shrinking_it_is_an_unmap(kind: str) -> None:
    """mremap(2) tells of what is in the way, what is moved, what is cut off and what is left, in this order."""
    play(moved_onto, kind)


# Emptied without a word


class Again(Resolver):
    """Fills pages with what was not there before."""

    def missing(self, uffd: Userfaultfd, page: int, fault: aiouffd.PageFault) -> None:
        """Fill it."""
        assert uffd.copy(page, b"B" * self.page_size) == self.page_size


def punched(kind: str) -> None:
    """Scenario."""
    area = memory(kind, 2 if kind.startswith("hugetlb") else 8)
    size, last = area.page_size, area.pages - 1
    with ReaderProcess(Again(area)) as reader, Userfaultfd(EVENTS) as uffd:
        uffd.register(area.address, area.length, MISSING)
        for number in range(area.pages):
            assert uffd.copy(area.page(number), b"A" * size) == size
        area.punch(last * size, size)  # nobody reads events yet: were one sent, this would not return
        os.ftruncate(area.fd, last * size)
        os.ftruncate(area.fd, area.length)
        assert uffd.read() == []
        reader.serve(uffd)
        assert area.read(0) == b"A" * size
        assert reader.seen() == {}
        assert area.read(last) == b"B" * size  # missing, as at first: not zeros
        assert reader.seen() == {"missing": 1}
        area.punch(0, area.length)
        assert [area.read(number)[:1] for number in range(area.pages)] == [b"B"] * area.pages
        assert reader.seen() == {"missing": 1 + area.pages}
        libc.madvise(area.page(last), size, mmap.MADV_DONTNEED)  # tells, but leaves the page in the file
        assert reader.seen() == {"missing": 1 + area.pages, "remove": 1}
        assert area.read(last) == b"B" * size
        assert reader.seen() == {"missing": 1 + area.pages, "remove": 1}


@pytest.mark.parametrize("kind", ["shmem", "tmpfs", "hugetlb"], indirect=True)
def test_a_hole_that_is_punched_into_the_file_sends_no_remove(kind: str) -> None:
    """Nor does cutting the file: what was served once is simply missing again, and is asked for once more."""
    play(punched, kind)


def removed(kind: str) -> None:
    """Scenario."""
    area = memory(kind, 8)
    with Userfaultfd(EVENTS) as uffd:
        uffd.register(area.address, area.length, MISSING)
        for number in range(area.pages):
            assert uffd.copy(area.page(number), b"A" * PAGE) == PAGE
        advice = mmap.MADV_REMOVE if area.shared else mmap.MADV_DONTNEED
        gone = Remove(area.page(2), area.page(5))
        assert told(uffd, lambda: libc.madvise(gone.start, gone.end - gone.start, advice)) == [gone]
        assert uffd.copy(area.page(4), b"B" * PAGE) == PAGE  # by the time that the call returns it has gone
        with pytest.raises(aiouffd.PagePresentError):
            uffd.copy(area.page(5), b"B" * PAGE)
        assert area.read(4) + area.read(5) == b"B" * PAGE + b"A" * PAGE


@pytest.mark.parametrize("kind", ["anonymous", "anonymous-shared", "shmem", "tmpfs"], indirect=True)
def test_removing_through_the_mapping_sends_a_remove(kind: str) -> None:
    """The counterpart: madvise(2) tells exactly what it empties."""
    play(removed, kind)
