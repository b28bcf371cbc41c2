"""A region's descriptor, from entering a Monitor until what is missing is settled."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

import pytest
from hosts import EngineName, Host
from pattern import PAGE, Pattern, peek, word
from scenario import open_descriptors, play

import aiouffd
from aiouffd.kernel import libc
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import mapped
from aiouffd.monitor.held import Held
from aiouffd.monitor.registration import Registration

SIZE = 16 * PAGE


def registered(region: aiouffd.Region, features: Feature = Feature.THREAD_ID, **options: object) -> Registration:
    """Register a region, as a Monitor at its defaults does."""
    asked = {"writes": "", "children": False, "user_mode_only": False, "serves_system_calls": True} | options
    return Registration(Held(region), features, **asked)  # type: ignore[arg-type]


def is_missing(region: aiouffd.Region, page: int) -> bool:
    """Tell whether a system call on a page fails: it is missing, and nobody brings it."""
    read, write = os.pipe()
    try:
        os.write(write, memoryview(region)[page * PAGE : page * PAGE + 1])
    except OSError:
        return True
    finally:
        os.close(read)
        os.close(write)
    return False


def flags(region: aiouffd.Region) -> set[str]:
    """Return the flags of the region's mapping, as /proc/self/smaps has them."""
    found = False
    with open("/proc/self/smaps") as file:  # noqa: PTH123
        for line in file:
            if line.startswith(f"{region.address:x}-"):
                found = True
            elif found and line.startswith("VmFlags:"):
                return set(line.split()[1:])
    raise AssertionError("the region is not mapped as one")


def settled(sigbus: bool, in_thread: bool) -> None:
    """Scenario: a page is there, the others are missing when it is settled."""
    region = aiouffd.Region(SIZE)
    before = open_descriptors()
    registration = registered(region, Feature.SIGBUS if in_thread else Feature.THREAD_ID)
    registration.uffd.copy(region.address + PAGE, b"x" * PAGE)
    assert "dc" in flags(region)  # MADV_DONTFORK
    registration.settle(sigbus=sigbus)
    registration.settle(sigbus=not sigbus)  # the first one counts
    with pytest.raises(aiouffd.ClosedError):
        _ = registration.uffd
    assert region[PAGE] == ord("x")
    assert is_missing(region, 2) == sigbus
    if not sigbus:
        assert region[2 * PAGE] == 0
        assert "dc" not in flags(region)
        assert open_descriptors() == before
    region.close()
    del registration
    assert open_descriptors() == before


@pytest.mark.parametrize("in_thread", [False, True], ids=["messages", "signals"])
@pytest.mark.parametrize("sigbus", [True, False], ids=["sigbus", "zeros"])
def test_what_is_missing_is_settled_once(sigbus: bool, in_thread: bool) -> None:
    """SIGBUS or zeros from then on; what is there stays; no descriptor is left behind."""
    play(settled, sigbus, in_thread)


def abandoned() -> None:
    """Scenario: a registration that was undone, and one that could not be made."""
    region = aiouffd.Region(SIZE)
    before = open_descriptors()
    registered(region).abandon()
    assert region[PAGE] == 0
    assert "dc" not in flags(region)
    other = aiouffd.Userfaultfd()
    other.register(region.address, SIZE, RegisterMode.MISSING)
    with pytest.raises(aiouffd.BusyError):
        registered(region)
    assert "dc" not in flags(region)
    other.close()
    assert open_descriptors() == before
    region.close()
    with pytest.raises(aiouffd.ClosedError):
        registered(region)


def test_what_is_undone_leaves_no_trace() -> None:
    """See the scenario."""
    play(abandoned)


def modes() -> None:
    """Scenario: what is registered for what."""
    private, shared = aiouffd.Region(SIZE), aiouffd.Region(SIZE, shared=True)
    assert registered(private).modes == RegisterMode.MISSING
    assert registered(shared).modes == RegisterMode.MISSING | RegisterMode.MINOR
    tracked = registered(aiouffd.Region(SIZE), writes="tracked")
    assert tracked.modes == RegisterMode.MISSING | RegisterMode.WP
    assert Feature.WP_ASYNC in tracked.uffd.features
    served = registered(aiouffd.Region(SIZE), writes="served")
    assert served.modes == RegisterMode.MISSING | RegisterMode.WP
    assert Feature.WP_ASYNC not in served.uffd.features
    child = registered(aiouffd.Region(SIZE), children=True)
    assert Feature.EVENT_FORK in child.uffd.features
    child.is_served()
    assert "dc" not in flags(child.region)


def test_modes_and_features() -> None:
    """See the scenario."""
    play(modes)


def raced() -> None:
    """Scenario: the pager is lost while the Monitor is being left: both settle."""
    for _ in range(50):
        region = aiouffd.Region(SIZE)
        registration = registered(region)
        threads = [threading.Thread(target=registration.settle, kwargs={"sigbus": True}) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert is_missing(region, 1)
        region.close()


def test_two_threads_settle_at_once() -> None:
    """Nothing is closed twice, and what is missing is SIGBUS."""
    play(raced)


def moved_by_mmap() -> None:
    """Scenario: the region of a registration is an mmap like any other."""
    region = aiouffd.Region(SIZE)
    registration = registered(region)
    assert isinstance(region, mmap.mmap)
    registration.uffd.zeropage(region.address, SIZE)
    assert region.find(b"x") == -1
    registration.settle(sigbus=True)
    assert not is_missing(region, 0)


def test_a_fork_in_the_middle_of_settling() -> None:
    """One by a signal handler, which interrupts it: where the pager was given up, that settles the memory, too."""
    with aiouffd.Region(SIZE) as region:
        registration = registered(region)

        def settle() -> None:
            with registration._lock:
                registration.settle(sigbus=True)

        thread = threading.Thread(target=settle, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        assert is_missing(region, 0)


def test_a_region_without_missing_pages() -> None:
    """Nothing has to be settled."""
    play(moved_by_mmap)


def children_of_users(privileged: bool) -> None:
    """Scenario: whether forked children have the region is left to what this user may."""
    region = aiouffd.Region(SIZE)
    if not privileged:
        os.setuid(65534)
    registration = registered(region, children=None, user_mode_only=not privileged)
    assert registration.children is privileged
    registration.is_served()
    assert ("dc" in flags(region)) is not privileged  # MADV_DONTFORK
    assert (Feature.EVENT_FORK in registration.uffd.features) is privileged
    if not privileged:
        other = aiouffd.Region(SIZE)
        with pytest.raises(aiouffd.AccessError, match="CAP_SYS_PTRACE"):
            registered(other, children=True, user_mode_only=True)
    registration.abandon()


@pytest.mark.parametrize("privileged", [True, False])
def test_children_are_served_where_this_user_may(privileged: bool) -> None:
    """Without CAP_SYS_PTRACE they do not have the region. Where that was asked for, it is an error."""
    play(children_of_users, privileged)


def grown_memory_is_given_back(engine: EngineName) -> None:
    """Scenario: pages are moved and grow, a child is forked and lives on, the Monitor is left, and the rest touched."""
    size = 64 * PAGE
    region = aiouffd.Region(size)
    with Host(engine, region, Pattern(size), timeout=None, readahead=0, background=False):
        read, write = os.pipe()  # not before: a server that is forked would keep it open
        grown = region.address
        if engine in {"pager", "served_by"}:
            grown = libc.mremap(region.address + 32 * PAGE, 32 * PAGE, 64 * PAGE, libc.MREMAP_MAYMOVE)
            assert ctypes.string_at(grown + 40 * PAGE, 8) == bytes(8)
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            links = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
            os._exit(sum("userfaultfd" in str(link) for link in links))
        os.close(read)
    if engine in {"pager", "served_by"}:
        assert peek(grown + 50 * PAGE) == bytes(8)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("engine", ["pager", "served_by", "in_thread", "in_process"])
def test_a_forked_child_does_not_keep_memory_registered(engine: str) -> None:
    """The kernel gives what grew back when the last descriptor is closed: a child has none of its parent's."""
    play(grown_memory_is_given_back, engine)


def children_without_the_region(in_thread: bool) -> None:
    """Scenario: a child frees a region of which it got nothing, and then one of which it got the present pages."""
    region = aiouffd.Region(SIZE)
    place = region.address

    def forks() -> None:
        child = os.fork()
        if not child:
            kept = []
            try:
                kept.append(sum(item.length for item in mapped(place, SIZE)))
                region.close()
                kept.append(sum(item.length for item in mapped(place, SIZE)))
            finally:  # what is raised here would leave the parent's block
                os._exit(7 if kept == [SIZE, SIZE] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    engine = aiouffd.InThread() if in_thread else aiouffd.Pager()
    with aiouffd.Monitor(region, Pattern(SIZE), engine=engine, readahead=0, fork="dontfork"):
        forks()
        assert peek(place + PAGE) == word(1)
    forks()


@pytest.mark.parametrize("in_thread", [True, False])
def test_nothing_else_comes_where_a_child_has_no_region(in_thread: bool) -> None:
    """Other memory there would be read and written by mistake, and unmapped with the region."""
    play(children_without_the_region, in_thread)


def test_children_have_the_region_when_somebody_reads() -> None:
    """A fork() before would wait for that. Once it was settled, they do not get what is missing any more."""
    region = aiouffd.Region(SIZE)
    registration = registered(region, children=True)
    assert "dc" in flags(region)
    registration.is_served()
    assert "dc" not in flags(region)
    registration.settle(sigbus=True)
    assert "dc" in flags(region)
    registration.is_served()
    assert "dc" in flags(region)
    alone = aiouffd.Region(SIZE)
    registration = registered(alone)
    registration.is_served()
    assert "dc" in flags(alone)
    registration.abandon()
    assert "dc" not in flags(alone)
