"""`server.mapped`: nydus' clients, which map what they are given, connect again, or have their pages copied."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
from pathlib import Path

import pytest
from nydus_client import COPY, NydusClient, _libc
from pattern import PAGE, Touchers, diffs, peek, word
from scenario import ended, eventually, play
from served import MIB, Serve, Servers, on_the_web

import aiouffd

WINDOW = 16 * PAGE
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10


def touched(client: NydusClient, first: int, end: int) -> None:
    """Touch pages at random from four threads; each is right."""
    pages = [random.sample(range(first, end), (end - first) // 2) for _ in range(4)]
    touchers = Touchers(client.region.address, pages)
    touchers.join()
    assert not touchers.wrong
    assert client.problem is None


def clients_map(path: str, image: str) -> None:
    """Scenario: faults of several threads, writes, memory that was given back, memory behind the file's end."""
    size = Path(image).stat().st_size  # not whole pages
    client = NydusClient(path, 16 * MIB, features=aiouffd.Feature.EVENT_REMOVE)
    assert client.size == size
    where = client.region.address
    client.region.madvise(mmap.MADV_DONTNEED, 3 * WINDOW + PAGE, PAGE)
    touched(client, 3 * 16 + 2, 2 * MIB // PAGE)
    offsets = [offset for offset, _ in client.mapped]
    assert len(set(offsets)) == len(offsets) >= 2 * MIB // WINDOW - 4  # nothing is mapped twice: it may be written
    assert all(offset % WINDOW in {0, 2 * PAGE} and length <= WINDOW for offset, length in client.mapped)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if image in line]
    assert sum(int(b, 16) - int(a, 16) for a, b in (line[0].split("-") for line in lines)) == sum(
        length for _, length in client.mapped
    )
    assert peek(where + 5 * PAGE) == word(5)
    client.region[5 * PAGE : 5 * PAGE + 2] = b"ab"
    assert peek(where + 5 * PAGE)[:2] == b"ab"
    assert peek(where + 3 * WINDOW + PAGE) == bytes(8)
    assert peek(where + 3 * WINDOW + 2 * PAGE) == word(3 * WINDOW // PAGE + 2)
    tail = size // PAGE
    assert peek(where + tail * PAGE, PAGE) == (word(tail) * (PAGE // 8))[: size % PAGE].ljust(PAGE, b"\0")
    assert peek(where + 16 * MIB - PAGE) == bytes(8)
    # What it has lost and registered again is given once more.
    offset, length = client.mapped[0]
    given = len(client.mapped)
    _libc.mmap(where + offset, length, mmap.PROT_READ | mmap.PROT_WRITE, _ANONYMOUS, -1, 0)
    client.uffd.register(where + offset, length, aiouffd.RegisterMode.MISSING)
    assert peek(where + offset) == word(offset // PAGE)
    assert client.mapped[given:] == [(offset, length)]  # and nothing else
    touched(client, 1024, tail)
    # What was given back is known to the next connection, too: a neighbour's answer leaves it alone, written or not.
    written, untouched, asked = (1000 + page for page in (1, 2, 3))
    given = len(client.mapped)
    client.region.madvise(mmap.MADV_DONTNEED, written * PAGE, 2 * PAGE)
    client.region[written * PAGE : written * PAGE + 2] = b"ab"
    client.hang_up()
    eventually(lambda: client.connections, 2)
    assert peek(where + asked * PAGE) == word(asked)
    assert peek(where + written * PAGE)[:2] == b"ab"
    assert peek(where + untouched * PAGE) == bytes(8)
    assert client.mapped[given:] == [(992 * PAGE, 9 * PAGE), (asked * PAGE, 5 * PAGE)]


def test_a_client_maps(image: Path, tmp_path: Path) -> None:
    """Each byte is right; the file's pages are its own; what it has written or given back stays so."""
    os.truncate(image, 16 * MIB - PAGE - 1000)
    with Serve(tmp_path, image) as serve:
        play(clients_map, str(serve.path), str(image))
        serve.says("client 1 (process")
        eventually(lambda: "its connection has" in serve.said, expected=True)


def clients_connect_again(directory: str, image: str) -> None:
    """Scenario: all of a server is killed, and the next one comes, while threads touch; a connection ends."""
    servers = Servers(directory, image)
    servers.start("first")
    mapping = NydusClient(servers.path)
    giving = NydusClient(servers.path, features=aiouffd.Feature.EVENT_REMOVE)
    giving.region.madvise(mmap.MADV_DONTNEED, 17 * PAGE, PAGE)
    giving.region[17 * PAGE : 17 * PAGE + 2] = b"ab"
    assert peek(giving.region.address) == word(0)
    assert giving.mapped == [(0, WINDOW)]
    copied = NydusClient(servers.path, policy=COPY, features=aiouffd.Feature.EVENT_REMOVE)
    copied.region.madvise(mmap.MADV_DONTNEED, 0, PAGE)
    assert peek(copied.region.address) == bytes(8)
    copied.hang_up()
    servers.last.says("has connected again")
    # A page that it has lost, beside one that it has written, is all that the next connection gives of their window.
    address = mapping.region.address + 4006 * PAGE
    assert peek(address) == word(4006)
    mapping.region[4005 * PAGE : 4005 * PAGE + 2] = b"ab"
    _libc.mmap(address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, _ANONYMOUS, -1, 0)
    mapping.uffd.register(address, PAGE, aiouffd.RegisterMode.MISSING)
    mapping.hang_up()
    eventually(lambda: mapping.connections, 2)
    assert peek(address) == word(4006)
    assert mapping.mapped[-1] == (4006 * PAGE, PAGE)
    assert mapping.region[4005 * PAGE : 4005 * PAGE + 2] == b"ab"
    for number in range(3):
        touchers = [
            Touchers(each.region.address, [range(number * 1000 + 1, number * 1000 + 1000)] * 2)
            for each in (mapping, copied)
        ]
        if number:
            if number == 2:
                copied.hang_up()
            servers.lose()
            servers.start(f"next-{number}")
            assert peek(giving.region.address + (17 + number) * PAGE) == word(17 + number)
            assert giving.mapped[number:] == [((17 + number) * PAGE, PAGE)]  # who knows what else it has given back
            assert giving.region[17 * PAGE : 17 * PAGE + 2] == b"ab"
            if number == 1:  # on the connection that the server before it has left
                copied.ask()
                eventually(lambda: len(copied.stated), 2)
        for each in touchers:
            each.join()
            assert not each.wrong
        assert mapping.problem is copied.problem is None
    assert mapping.connections >= 3
    copied.hang_up()
    servers.last.says("has connected again")
    assert peek(copied.region.address) == bytes(8)  # what was given back is not the source's
    os.kill(servers.last.process.pid, signal.SIGTERM)
    print(json.dumps(servers.pids))


def test_clients_connect_again(image: Path, tmp_path: Path) -> None:
    """No fault is lost, and what was given back stays so."""
    output, _ = play(clients_connect_again, str(tmp_path), str(image))
    assert all(map(ended, json.loads(output).values()))


def clients_want_all(path: str, folder: str) -> None:
    """Scenario: layers with holes, all of it at once, in more ranges than an answer has; answers without a length."""
    _, model = diffs(folder)
    client = NydusClient(path, window=MIB, prefault=True, bare=True)
    eventually(lambda: sum(length for _, length in client.mapped), client.size // 16 * 15)  # the rest are holes
    assert len(client.mapped) > 16
    assert peek(client.region.address, client.size) == model
    assert client.problem is None
    client.region[:2], given = b"ab", len(client.mapped)
    client.hang_up()
    copied = NydusClient(path, client.size + PAGE, COPY, window=16 * MIB, prefault=True, bare=True)
    assert peek(copied.region.address, client.size + PAGE) == model + bytes(PAGE)
    assert not copied.mapped
    copied.ask()
    eventually(lambda: [each["size"] for each in copied.stated], [client.size] * 2)
    assert client.connections == 2
    assert len(client.mapped) == given  # it may have written to all that it has mapped
    assert client.region[:2] == b"ab"


def test_a_client_that_wants_all_at_once(tmp_path: Path) -> None:
    """From three files; or copied, with what is behind their end."""
    (base, *above), _ = diffs(str(tmp_path))
    (tmp_path / "alike").mkdir()
    layers = [part for each in above for part in ("--diff", each)]
    with Serve(tmp_path, base, *layers, "--nydus-answers", "bare") as serve:
        play(clients_want_all, str(serve.path), str(tmp_path / "alike"))


def clients_cannot_map(path: str) -> None:
    """Scenario: a client that is turned away; it may have its pages copied."""
    refused = NydusClient(path)
    with pytest.raises(OSError, match="Bad address"):
        os.write(os.memfd_create("x"), memoryview(refused.region)[:8])
    assert peek(NydusClient(path, policy=COPY).region.address) == word(0)


@pytest.mark.parametrize("why", ["is no file", "clients are limited here"])
def test_clients_that_cannot_map(why: str, image: Path, tmp_path: Path) -> None:
    """Where there is no file to map, and where what is mapped would be beyond a limit."""
    limited = ("--client-bytes", "1G") if "limited" in why else ()
    with on_the_web(image) as url, Serve(tmp_path, image if limited else url, *limited) as serve:
        play(clients_cannot_map, str(serve.path))
        serve.says(f"wants to map files (policy 0): {'' if limited else 'ObjectSource'}")
        serve.says(why)
        serve.says("policy 1 copies")
