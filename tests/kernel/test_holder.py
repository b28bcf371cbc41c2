"""`process.holder`: what a server's clients have when all of its processes are killed, and when another takes over."""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pattern import PAGE, Touchers, peek, word
from processes import forked
from scenario import ended, eventually, play
from served import MIB, ROOT, Servers, end_server, hand_over

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from aiouffd.pager.client.interpreter import SWITCH
from aiouffd.pager.client.succession import HolderLostError, Predecessor
from aiouffd.pager.process import control
from aiouffd.pager.process.handles import close_all
from aiouffd.pager.process.holder import Holder
from aiouffd.pager.process.journal import VERSION, Journal

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 8 * MIB


def waits(go: int, address: int) -> bool:
    """Be the forked child: what it touches is served, once it is told to go on."""
    os.read(go, 1)
    return peek(address) == bytes(8) and all(peek(address + page * PAGE) == word(page) for page in (2, 300))


def a_machine(directory: str, image: str) -> None:
    """Scenario: a client that reads no socket, and its forked child."""
    servers = Servers(directory, image, "--readahead", 0)
    servers.start("first")
    region = aiouffd.Region(SIZE)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_FORK | aiouffd.Feature.EVENT_REMOVE)
    uffd.register(region.address, SIZE, aiouffd.RegisterMode.MISSING)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(servers.path))
    shown = firecracker.encode([Mapping(region.address, region.address + SIZE, 0)], PAGE)
    socket.send_fds(connection, [shown], [uffd.fileno()])
    uffd.close()  # nobody but the servers has it
    assert peek(region.address) == word(0)
    region.madvise(mmap.MADV_DONTNEED, 0, PAGE)
    go, told = os.pipe()
    child = forked(waits, go, region.address)

    def touched(pages: range) -> Touchers:
        return Touchers(region.address, [pages[n::4] for n in range(4)])

    servers.lose()
    touchers = touched(range(1, 200))
    servers.start("second")
    touchers.join()
    assert peek(region.address) == bytes(8)  # as the journal says
    os.write(told, b".")
    assert os.waitpid(child, 0)[1] == 0
    second, holder = servers.last, servers.pids["holder"]
    refused = servers.start("third", wait=False)
    assert refused.process.wait(60) == 1
    assert "--takeover" in refused.said
    touchers = touched(range(200, 600))
    third = servers.start("fourth", "--takeover")
    touchers.join()
    assert second.process.wait(60) == 0
    assert ended(holder)
    second.says("another server has taken over")
    other, *_kept = hand_over(servers.path)  # a new client, at the same socket
    assert peek(other.address) == word(0)
    failing = Predecessor.at(servers.hold)
    assert failing is not None
    journal = Journal.create()
    journal.provisional = True  # as that of a pager that is not told to go
    journal._words[1] = VERSION + 1  # and of a newer aiouffd
    failing.take(over=True, journal=journal.fd).close()  # nobody serves now
    touchers = touched(range(600, SIZE // PAGE))
    failing.close()
    touchers.join()
    third.says("serving on")
    assert not touchers.wrong
    assert peek(other.address + PAGE) == word(1)
    print(json.dumps(servers.pids))


def a_monitor(directory: str, image: str) -> None:
    """Scenario: a client that asks questions: what was asked when all were killed is answered by the next server."""
    servers = Servers(directory, image)
    servers.start("first")
    with aiouffd.Monitor(aiouffd.Region(SIZE), engine=aiouffd.ServedBy(str(servers.path))) as monitor:
        monitor.prefetch_sync(0, MIB)
        os.kill(servers.pids["worker"], signal.SIGSTOP)
        asker = threading.Thread(target=monitor.prefetch_sync, args=(MIB, MIB))
        asker.start()
        servers.lose()
        servers.start("second")
        asker.join()
        assert sum(each.length for each in monitor.residency()) == 2 * MIB
        servers.start("third", "--takeover")
        monitor.prefetch_sync(2 * MIB, MIB)
        assert sum(each.length for each in monitor.residency()) == 3 * MIB
        assert bytes(monitor.region[2 * MIB : 2 * MIB + 8]) == word(512)
        assert monitor.statistics().pages_prefetch == 3 * MIB // PAGE  # counted on
        monitor.check()
    print(json.dumps(servers.pids))


@pytest.mark.parametrize("client", [a_machine, a_monitor])
def test_all_are_killed_and_another_takes_over(client: object, image: Path, tmp_path: Path) -> None:
    """Threads that wait meanwhile go on, with the right bytes; at the end nothing is left."""
    output, _ = play(client, str(tmp_path), str(image))  # type: ignore[arg-type]
    end_server(output)


class Clients:
    """Clients that touch a page each, now and then, and whose descriptors nobody but the servers has."""

    def __init__(self, servers: Servers, count: int) -> None:
        self._regions = []
        for _ in range(count):
            region, self._connection, uffd = hand_over(servers.path, SIZE)
            assert peek(region.address) == word(0)
            uffd.close()
            self._regions.append((region, self._connection))
        self._pages = iter(range(1, SIZE // PAGE))

    def touch(self) -> list[Touchers]:
        """Begin to touch the next page."""
        page = next(self._pages)
        return [Touchers(region.address, [[page]]) for region, _ in self._regions]

    def check(self, touchers: list[Touchers] | None = None) -> None:
        """See that each has the right bytes."""
        for toucher in touchers or self.touch():
            toucher.join()
            assert not toucher.wrong


def kill(pids: dict[str, int], *names: str) -> None:
    """Kill some processes at once."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for name in names:
            os.kill(pids[name], number)


def each_is_killed(directory: str, image: str) -> None:
    """Scenario: a takeover behind deaths of which the server hears nothing, and behind one that it sees to itself."""
    servers = Servers(directory, image, "--readahead", 0)
    serve = servers.start("first")
    clients = Clients(servers, 3)
    for names in (("holder",), ("keeper",), ("keeper", "worker"), ("worker", "holder"), ("holder",), ("keeper",)):
        before = servers.pids
        kill(before, *names)
        clients.check()
        eventually(lambda: [name for name in names if servers.pids[name] == before[name]], expected=[])  # noqa: B023
    assert "is replaced" in serve.said
    assert "the pager's keeper" not in serve.said
    for killed in (("holder",), ("keeper", "holder"), ("keeper", "worker", "holder")):
        kill(servers.pids, *killed)
        after = servers.start("-".join(killed), "--takeover")
        assert serve.process.wait(60) == 0
        serve = after
        clients.check()
    print(json.dumps(servers.pids))


FORKED = f"""#!{sys.executable}
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from aiouffd.kernel import files
from aiouffd.pager.process import holder, keeper
holder._REMINDER = 0.1
read = files.read
def unless_it_is_of_a_pidfd(path):
    if "fdinfo" in path:
        raise FileNotFoundError(2, "there is no /proc", path)
    return read(path)
files.read = unless_it_is_of_a_pidfd
make = keeper._Keeper._make
def and_be_killed(self, whose, be):
    if whose is not keeper.Whose.WORKER or os.path.exists(os.environ["KILLED"]):
        return make(self, whose, be)
    open(os.environ["KILLED"], "w").close()
    make(self, whose, lambda: (time.sleep(0.3), be()))  # it has done nothing yet when it is looked for
    os.kill(os.getpid(), 9)
keeper._Keeper._make = and_be_killed
send = holder.send_signal
def or_be_killed(pidfd, number):
    if os.path.exists(os.environ["GIVES"]):
        return send(pidfd, number)
    open(os.environ["GIVES"], "w").close()
    os.kill(os.getpid(), 9)
holder.send_signal = or_be_killed
sys.argv = ["aiouffd.pager", *sys.argv[sys.argv.index("aiouffd.pager") + 1 :]]
from aiouffd.pager import __main__
sys.exit(__main__.main())
"""


def killed_behind_the_fork(directory: str, image: str) -> None:
    """Scenario: the next keeper goes on with the worker that the one before had just forked, also without /proc.

    The holder is killed, too, when it is about to kill keeper and worker for a successor: they go on.
    """
    wrapper = Path(directory) / "python"
    wrapper.write_text(FORKED)
    wrapper.chmod(0o755)
    os.environ |= {SWITCH: str(wrapper), "KILLED": f"{directory}/killed", "GIVES": f"{directory}/gives"}
    servers = Servers(directory, image)
    serve = servers.start("first")
    clients = Clients(servers, 2)
    clients.check()
    assert os.path.exists(os.environ["KILLED"])  # noqa: PTH110 - a name of the environment
    pids = servers.pids  # one of each
    assert serve.said.count("is replaced") == 1
    taker, journal = Predecessor.at(servers.hold), Journal.create()
    assert taker is not None
    journal.provisional = True
    with pytest.raises(HolderLostError):
        taker.take(over=True, journal=journal.fd)
    serve.says("serving on")
    kill(servers.pids, "worker")
    clients.check()
    keeper, pids = pids["keeper"], servers.pids
    assert pids["keeper"] == keeper
    taker, before = Predecessor.at(servers.hold), serve.said.count("serving on")
    assert taker is not None
    taker.take(over=True, journal=journal.fd).close()
    serve.says("does not serve yet")
    taker.close()
    eventually(lambda: serve.said.count("serving on"), expected=before + 1)
    clients.check()
    print(json.dumps(servers.pids))


AT_A_FORK = f"""#!{sys.executable}
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from aiouffd.kernel import abi
from aiouffd.pager.process.journal import Journal, Whose
from aiouffd.pager.process.served import Served
commit, keep, forked = Journal.commit_events, Served._keep, Served._forked
def may_be_killed(journal, step):
    try:
        os.unlink(os.environ["ARMED"] + str(step))
    except FileNotFoundError:
        return
    signal.pidfd_send_signal(journal.descriptor(Whose.KEEPER), 9)
    os.kill(os.getpid(), 9)
def commits(self, identity, layout):
    if any(message[0] == abi.EVENT_FORK for message in layout):
        may_be_killed(self, 0)
        commit(self, identity, layout)
        may_be_killed(self, 2)
    else:
        commit(self, identity, layout)
def keeps(self, identity, fd):
    may_be_killed(self.journal, 1)
    keep(self, identity, fd)
def has_forked(self, parent, child):
    forked(self, parent, child)
    may_be_killed(self.journal, 3)
Journal.commit_events, Served._keep, Served._forked = commits, keeps, has_forked
sys.argv = ["aiouffd.pager", *sys.argv[sys.argv.index("aiouffd.pager") + 1 :]]
from aiouffd.pager import __main__
sys.exit(__main__.main())
"""
STEPS = 4


def killed_at_each_fork(directory: str, image: str) -> None:
    """Scenario: keeper and worker are killed between the read of a fork and the end of what is done about it."""
    wrapper = Path(directory) / "python"
    wrapper.write_text(AT_A_FORK)
    wrapper.chmod(0o755)
    os.environ |= {SWITCH: str(wrapper), "ARMED": f"{directory}/armed"}
    servers = Servers(directory, image, "--readahead", 0)
    servers.start("first")
    region = aiouffd.Region(SIZE)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_FORK)
    uffd.register(region.address, SIZE, aiouffd.RegisterMode.MISSING)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(servers.path))
    shown = firecracker.encode([Mapping(region.address, region.address + SIZE, 0)], PAGE)
    socket.send_fds(connection, [shown], [uffd.fileno()])
    assert peek(region.address) == word(0)
    go, told = os.pipe()
    ready, say = os.pipe()

    def child(page: int) -> bool:
        found = peek(region.address + page * PAGE) == word(page)
        os.write(say, b".")
        os.read(go, 1)
        return found and peek(region.address + (page + 1) * PAGE) == word(page + 1)

    children = []
    for page in range(2 * STEPS):
        armed = Path(f"{directory}/armed{page % STEPS}")  # by whoever reads of the fork
        armed.touch()
        children.append(forked(child, 2 * page + 2))
        os.read(ready, 1)
        assert not armed.exists()
    servers.lose()
    servers.start("second")
    os.write(told, b"." * len(children))
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * len(children)
    print(json.dumps(servers.pids))


def all_are_killed_twice(directory: str, image: str) -> None:
    """Scenario: keeper and worker are killed, and the next ones with the server, before these serve anything."""
    servers = Servers(directory, image, "--readahead", 0)
    servers.start("first")
    clients = Clients(servers, 20)
    kill(servers.pids, "keeper", "worker")
    touchers = clients.touch()
    servers.lose()
    servers.start("second")
    clients.check(touchers)
    clients.check()
    print(json.dumps(servers.pids))


def fill_table(pid: int) -> Callable[[], object]:
    """Have a process get no further descriptor; return what ends that."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    free = next(number for number in itertools.count() if number not in taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, limits[1]))
    return lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def no_descriptor_is_left(directory: str, image: str) -> None:
    """Scenario: a server that cannot receive what comes with the word of a takeover serves on, alone."""
    servers = Servers(directory, image, "--readahead", 0)
    first = servers.start("first")
    clients = Clients(servers, 3)
    before = servers.pids
    free_table = fill_table(before["server"])
    refused = servers.start("second", "--takeover", wait=False)
    assert refused.process.wait(60) == 1
    assert "too many files open" in refused.said
    first.says("another server cannot take over")
    clients.check()
    free_table()
    servers.last = first
    assert servers.pids == before
    servers.start("third", "--takeover")
    assert first.process.wait(60) == 0
    clients.check()
    print(json.dumps(servers.pids))


@pytest.mark.parametrize(
    "scenario",
    [each_is_killed, all_are_killed_twice, killed_behind_the_fork, killed_at_each_fork, no_descriptor_is_left],
)
def test_keeper_and_holder_make_each_other_anew(scenario: object, image: Path, tmp_path: Path) -> None:
    """What they share stays what it is: nobody is lost, whichever of them is killed, and the server with them."""
    output, _ = play(scenario, str(tmp_path), str(image))  # type: ignore[arg-type]
    end_server(output)


def test_what_is_said_to_another_successor_is_no_answer(tmp_path: Path) -> None:
    """The owner may say that it has yielded to one that has ended, when it goes on: nothing is given for that."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        contextlib.ExitStack() as stack,
    ):
        listener.bind(str(tmp_path / "hold"))
        (connection, _owner), (channel, owner), (guest, _successor) = [
            map(stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)) for _ in range(3)
        ]
        journal = Journal.create()
        holder = Holder(journal, connection, listener, channel, set(), lambda: None)
        for op in ("yielded", "yielded 1", "refuse"):
            control.send(owner, {"op": op})
        with pytest.raises(Exception, match="too many files open"):
            holder._await_yield(journal.fd, guest)
        message, fds = control.receive(owner)
        close_all(fds)
        assert message["event"].startswith("yield ")
        os.close(journal.fd)
