"""The cases of the kernel's own selftest of userfaultfd, each under its name there, on each kind of memory.

Opening, registering, resolving, events. Write protection across forks, UFFDIO_MOVE and the stress test have modules
of their own beside this one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import select
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from faults import BUS_ADRERR, BUS_MCEERR_AR, on_sigbus, protected
from kinds import HUGE, LARGE, MAKERS, SMALL, Memory, map_at, memory, on, pages_of, place, poke
from pattern import PAGE, content, peek
from reader import ReaderProcess, Resolver, in_child
from scenario import play

import aiouffd
from aiouffd import Feature, Ioctl, RegisterMode, Userfaultfd
from aiouffd.kernel import abi, libc

if TYPE_CHECKING:
    from collections.abc import Callable

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR

PMD = 2 << 20
MADV_COLLAPSE = 25  # Linux 6.1
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


# api


@pytest.mark.parametrize("way", ["syscall", "device"])
def test_api(way: str) -> None:
    """A wrong version, then an unknown feature are refused; the descriptor can be used all the same, but once."""
    with Userfaultfd(opened_by=way) as uffd:
        assert uffd.opened_by == way
        with pytest.raises(OSError, match="Invalid") as caught:
            fcntl.ioctl(uffd.fileno(), abi.UFFDIO_API, bytearray(abi.API_STRUCT.pack(abi.UFFD_API, 1, 0)))
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(aiouffd.UnsupportedError, match=str(1 << 63)):
        Userfaultfd(Feature(1 << 63), opened_by=way)
    if way == "syscall":
        fd = libc.syscall(abi.SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    else:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        fd = fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        os.close(device)
    for version, features, accepted in ((0xAB, 0, False), (abi.UFFD_API, 1 << 63, False), (abi.UFFD_API, 0, True)):
        argument = bytearray(abi.API_STRUCT.pack(version, features, 0))
        if accepted:
            fcntl.ioctl(fd, abi.UFFDIO_API, argument)
            assert abi.API_STRUCT.unpack(argument)[1] == aiouffd.probe().features
        else:
            with pytest.raises(OSError, match="Invalid"):
                fcntl.ioctl(fd, abi.UFFDIO_API, argument)
            assert argument == bytes(len(argument))  # nothing may be taken for an answer
    with Userfaultfd.from_fd(fd) as uffd:
        region = aiouffd.Region(PAGE)
        assert uffd.register(region.address, PAGE, MISSING) & Ioctl.COPY
        assert uffd.copy(region.address, content(0, PAGE)) == PAGE
        assert region[:] == content(0, PAGE)


# register-ioctls


@on("register-ioctls", [kind for kind in MAKERS if kind not in ("system-v", "disk", "disk-private")])
def test_register_ioctls(kind: str) -> None:
    """Each mode, and each combination, brings exactly its operations; MINOR needs a file, and no mode is none."""
    area = memory(kind, 1)
    small = area.page_size == PAGE
    for bits in range(8):
        mode = RegisterMode(bits)
        with Userfaultfd(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.MINOR_SHMEM) as uffd:
            if not mode or (mode & MINOR and kind in ("anonymous", "dev-zero-private")):
                with pytest.raises(aiouffd.OperationError, match="EINVAL"):
                    uffd.register(area.address, area.length, mode)
                continue
            expected = Ioctl.WAKE | Ioctl.COPY | Ioctl.POISON
            expected |= Ioctl.ZEROPAGE | Ioctl.MOVE if small else Ioctl(0)
            expected |= Ioctl.WRITEPROTECT if mode & WP else Ioctl(0)
            expected |= Ioctl.CONTINUE if mode & MINOR else Ioctl(0)
            assert uffd.register(area.address, area.length, mode) == expected, mode
            uffd.unregister(area.address, area.length)


# zeropage


def zeropage(kind: str) -> None:
    """Scenario."""
    area = memory(kind, 2)
    size = area.page_size
    with Userfaultfd() as uffd:
        has = uffd.register(area.address, area.length, MISSING) & Ioctl.ZEROPAGE
        assert bool(has) == (size == PAGE)
        if not has:
            with pytest.raises(aiouffd.OperationError, match="EINVAL"):
                uffd.zeropage(area.address, size)
            return
        assert uffd.zeropage(area.address, size) == size
        assert area.read(0) == bytes(size)
        with pytest.raises(aiouffd.PagePresentError):
            uffd.zeropage(area.address, size)
        if area.shared:  # the page is in the file now, wherever that is mapped
            alias = area.alias()
            uffd.register(alias, area.length, MISSING)
            with pytest.raises(aiouffd.PagePresentError):
                uffd.zeropage(alias, size)
        poke(area.address, b"mine")
        assert area.read(0)[:4] == b"mine"


@on("zeropage", SMALL + LARGE)
def test_zeropage(kind: str) -> None:
    """A page of zeros, once; through an alias it is there too; huge pages have no such operation."""
    play(zeropage, kind)


# minor, minor-wp, minor-collapse


SHARED = ("anonymous-shared", "shmem", "tmpfs", "hugetlb")
TURNED = bytes(255 - value for value in range(256))


class Turning(Resolver):
    """Turns over every bit of a page through another mapping of the file, and has it mapped then."""

    def __init__(self, area: Memory, alias: int, *, protect: bool) -> None:
        super().__init__(area, protect=protect)
        self.alias = alias

    def minor(self, uffd: Userfaultfd, page: int) -> None:
        """Turn it."""
        there = self.alias + page - self.start
        poke(there, peek(there, self.page_size).translate(TURNED))
        super().minor(uffd, page)
        with pytest.raises(aiouffd.PagePresentError):
            uffd.continue_(page, self.page_size)


def pmd_mapped(address: int) -> int:
    """Return how many bytes of the mapping at `address` are file pages mapped by huge entries."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(span[1], 16) <= address < int(span[2], 16)
        elif here and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1]) << 10
    raise AssertionError("nothing is mapped there")


def minor(kind: str, protect: bool, collapse: bool) -> None:
    """Scenario."""
    if collapse:
        area = memory(kind, 2 * PMD // PAGE)
        address = place(area.length)
        map_at(address, area.length, mmap.MAP_SHARED, area.fd)  # aligned, so that huge entries are possible
        area = Memory(address, area.pages, PAGE, True, area.fd, area.owner)
    else:
        area = memory(kind, pages_of(kind))
    alias = area.alias()
    size = area.page_size
    features = Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS | Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
    with ReaderProcess(Turning(area, alias, protect=protect)) as reader, Userfaultfd(features) as uffd:
        uffd.register(area.address, area.length, MINOR | WP if protect else MINOR)
        reader.serve(uffd)
        for at in range(0, area.length, size):
            poke(alias + at, content(at, size))
        assert reader.seen() == {}  # the other mapping is nobody's business

        def check() -> None:
            for page in range(area.pages):
                assert area.read(page) == content(page * size, size).translate(TURNED), page

        check()
        assert reader.seen() == {"minor": area.pages}
        check()
        if collapse:
            libc.madvise(area.address, area.length, MADV_COLLAPSE)
            assert pmd_mapped(area.address) == area.length
            check()
            for at in range(0, area.length, PMD):
                poke(area.address + at, b"all")
                assert peek(alias + at, 3) == b"all"
        if protect:
            for page in area.addresses():
                assert protected(page)
                poke(page, b"new")
                assert not protected(page)
                assert peek(page, 3) == b"new"
        assert reader.seen() == {"minor": area.pages, **({"wp": area.pages} if protect else {})}


@on("minor", SHARED)
def test_minor(kind: str) -> None:
    """What the file has and the mapping lacks is told once a page, changed meanwhile, and mapped by CONTINUE."""
    play(minor, kind, False, False)


@on("minor-wp", SHARED)
def test_minor_wp(kind: str) -> None:
    """CONTINUE may map write-protected: each page's first write is told as well."""
    play(minor, kind, True, False)


@on("minor-collapse", ["shmem"])
def test_minor_collapse(kind: str) -> None:
    """Memory that CONTINUE has mapped page by page collapses to huge pages without losing a byte."""
    knob = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if not knob.exists() or "[deny]" in knob.read_text():  # with "never", MADV_COLLAPSE works all the same
        pytest.skip("no transparent huge pages in shmem")
    play(minor, kind, False, True)


# sigbus, sigbus-wp


def sigbus(kind: str, protect: bool) -> None:
    """Scenario."""
    area = memory(kind, pages_of(kind))
    size = area.page_size
    features = Feature.SIGBUS | Feature.EVENT_FORK | Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
    mode = MISSING | WP if protect else MISSING
    with ReaderProcess(Resolver(area)) as reader, Userfaultfd(features) as uffd:
        uffd.register(area.address, area.length, mode)
        told: list[int] = []

        def resolve(address: int, code: int, _: int) -> None:
            assert code == BUS_ADRERR
            page = address & -size
            if page in told:
                uffd.writeprotect(page, size, protect=False)
            else:
                uffd.copy(page, content(page - area.address, size), write_protect=protect)
            told.append(page)

        on_sigbus(resolve)
        for number, page in enumerate(area.addresses()):
            assert area.read(number) == content(number * size, size)
            poke(page, b"mine")
            assert area.read(number) == b"mine" + content(number * size, size)[4:]
        assert told == [page for page in area.addresses() for _ in range(2 if protect else 1)]
        assert uffd.read() == []
        area.empty()
        reader.serve(uffd)

        def touch_all() -> None:
            signaled: list[int] = []

            def give_up(address: int, code: int, _: int) -> None:
                assert code == BUS_ADRERR
                signaled.append(address & -size)
                map_at(signaled[-1], size, ANONYMOUS)  # so that the instruction comes to an end

            on_sigbus(give_up)
            for page in area.addresses():
                assert peek(page) == bytes(8)
            assert signaled == list(area.addresses())

        in_child(touch_all)
        assert reader.seen() == {"fork": 1}  # and of no fault


@on("sigbus", SMALL + LARGE)
def test_sigbus(kind: str) -> None:
    """The toucher gets one signal a page and may resolve it there and then; a forked child gets them too."""
    play(sigbus, kind, False)


@on("sigbus-wp", SMALL + LARGE)
def test_sigbus_wp(kind: str) -> None:
    """A write to a protected page is a signal as well."""
    play(sigbus, kind, True)


# events, events-wp


def events(kind: str, protect: bool) -> None:
    """Scenario."""
    area = memory(kind, pages_of(kind))
    size, half = area.page_size, area.pages // 2
    features = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE
    features |= Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
    with ReaderProcess(Resolver(area, protect=protect)) as reader, Userfaultfd(features) as uffd:
        uffd.register(area.address, area.length, MISSING | WP if protect else MISSING)
        reader.serve(uffd)

        def check(first: int, end: int) -> None:
            for page in range(first, end):
                assert area.read(page) == content(page * size, size), page
                poke(area.page(page), content(page * size, 8))  # the same once more: a write

        def use_it_and_move_it() -> None:
            check(0, half)
            target = place(area.length)
            flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED
            assert libc.mremap(area.address, area.length, area.length, flags, target) == target
            area.address = target
            check(half, area.pages)
            check(0, half)
            area.empty()
            for page in range(area.pages):
                assert area.read(page) == bytes(size), page

        in_child(use_it_and_move_it)
        expected = {"fork": 1, "missing": area.pages, "remap": 1, "remove": 1}
        assert reader.seen() == {**expected, **({"wp": area.pages} if protect else {})}


@on("events", SMALL + LARGE)
def test_events(kind: str) -> None:
    """A forked child is served, also where it moves its memory to; what it removes is zeros. One fault a page."""
    play(events, kind, False)


@on("events-wp", SMALL + LARGE)
def test_events_wp(kind: str) -> None:
    """The same with pages that come protected: one more fault a page, and it is moved with its protection."""
    play(events, kind, True)


# poison


class Poisoning(Resolver):
    """Poisons the even pages and fills the odd ones."""

    def missing(self, uffd: Userfaultfd, page: int, fault: aiouffd.PageFault) -> None:
        """Do so."""
        assert fault.flags == aiouffd.FaultFlag(0)
        if (page - self.start) // self.page_size % 2:
            super().missing(uffd, page, fault)
        else:
            assert uffd.poison(page, self.page_size) == self.page_size


def poison(kind: str) -> None:
    """Scenario."""
    area = memory(kind, pages_of(kind))
    size = area.page_size
    with ReaderProcess(Poisoning(area)) as reader, Userfaultfd(Feature.POISON) as uffd:
        assert uffd.register(area.address, area.length, MISSING) >= Ioctl.COPY | Ioctl.POISON
        reader.serve(uffd)
        native = ctypes.CDLL(None, use_errno=True)
        native.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        assert native.write(os.pipe()[1], area.address, 1) == -1
        assert ctypes.get_errno() == errno.EFAULT
        signaled: list[int] = []

        def give_up(address: int, code: int, granularity: int) -> None:
            # A kernel without CONFIG_MEMORY_FAILURE has no other code than that of any bad address.
            assert (code, granularity) in ((BUS_MCEERR_AR, size), (BUS_ADRERR, 0))
            signaled.append(address & -size)
            map_at(signaled[-1], size, ANONYMOUS)

        on_sigbus(give_up)
        for page in range(area.pages):
            assert area.read(page) == (content(page * size, size) if page % 2 else bytes(size))
        assert signaled == list(area.addresses())[::2]
        assert reader.seen() == {"missing": area.pages}


@on("poison", SMALL + LARGE)
def test_poison(kind: str) -> None:
    """A poisoned page is SIGBUS to whoever touches it, EFAULT to a system call; its neighbours are whole."""
    play(poison, kind)


# mmap-changing


def mmap_changing(kind: str) -> None:
    """Scenario."""
    area = memory(kind, pages_of(kind, 8))
    size, base = area.page_size, area.address
    spare = aiouffd.Region(HUGE)
    spare[0] = 1
    mode = MISSING | WP | (MINOR if area.shared else RegisterMode(0))
    results = (
        (abi.UFFDIO_COPY, abi.COPY_STRUCT.pack(base, spare.address, size, 0, 0)),
        (abi.UFFDIO_MOVE, abi.COPY_STRUCT.pack(base, spare.address, size, 0, 0)),
        (abi.UFFDIO_ZEROPAGE, abi.ZEROPAGE_STRUCT.pack(base, size, 0, 0)),
        (abi.UFFDIO_POISON, abi.ZEROPAGE_STRUCT.pack(base, size, 0, 0)),
        (abi.UFFDIO_CONTINUE, abi.ZEROPAGE_STRUCT.pack(base, size, 0, 0)),
    )
    features = Feature.EVENT_REMOVE | Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.POISON
    with Userfaultfd(features) as uffd:
        uffd.register(base, area.length, mode)
        thread = threading.Thread(target=area.empty)
        thread.start()
        assert select.select([uffd], [], [], 10)[0]
        operations: list[Callable[[], object]] = [
            lambda: uffd.copy(base, content(0, size)),
            lambda: uffd.zeropage(base, size),
            lambda: uffd.poison(base, size),
            lambda: uffd.continue_(base, size),
            lambda: uffd.move(base, spare.address, size),
            lambda: uffd.writeprotect(base, size, protect=True),
        ]
        for operation in operations:
            with pytest.raises(aiouffd.LayoutChangingError):
                operation()
        for request, packed in results:  # the reason stands in the result as well, and not a number of bytes
            argument = bytearray(packed)
            with pytest.raises(BlockingIOError):
                fcntl.ioctl(uffd.fileno(), request, argument)
            assert abi.RESULT.unpack_from(argument, len(argument) - 8)[0] == -errno.EAGAIN
        uffd.wake(base, area.length)
        assert thread.is_alive()
        assert uffd.read() == [aiouffd.Remove(base, base + area.length)]
        thread.join()
        assert uffd.copy(base, content(0, size)) == size
        uffd.writeprotect(base, size, protect=True)
        assert protected(base)
        assert area.read(0) == content(0, size)
        assert uffd.poison(base + size, size) == size
        if size == PAGE:
            assert uffd.zeropage(base + 2 * size, size) == size
            assert area.read(2) == bytes(size)
        if kind == "anonymous":
            assert uffd.move(base + 3 * size, spare.address, size) == size
            assert area.read(3)[0] == 1


@on("mmap-changing", SMALL + LARGE)
def test_mmap_changing(kind: str) -> None:
    """From a REMOVE until it is read all that resolves is EAGAIN, said in the result too; then it works."""
    play(mmap_changing, kind)
