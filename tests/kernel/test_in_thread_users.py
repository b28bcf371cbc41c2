"""`Monitor(engine=InThread())` under libraries that read straight out of a lazy region, from many threads at once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scenario import play

import aiouffd

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 8 << 20
BLOB = 64 << 10
NEEDLE = b"here is the needle"


def make() -> bytes:
    """Return the bytes: numbers, and in each other block JSON, a pickle and a needle."""
    words = np.random.default_rng(7).integers(0, 1 << 20, SIZE // 4, dtype=np.int32)
    data = bytearray(words.tobytes())
    for number, at in enumerate(range(0, SIZE, 2 * BLOB)):
        text = json.dumps({"number": number, "list": list(range(2000))}).encode()
        pickled = pickle.dumps([(number, n) for n in range(1500)])
        data[at : at + len(text)] = text
        data[at + BLOB // 4 : at + BLOB // 4 + 4] = struct.pack("<I", len(pickled))
        data[at + BLOB // 4 + 4 : at + BLOB // 4 + 4 + len(pickled)] = pickled
        data[at + BLOB - 4096 : at + BLOB - 4096 + len(NEEDLE)] = NEEDLE
    return bytes(data)


class Mixed:
    """Some of it at hand, some after a while: by the offset."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """Return every third piece at once."""
        return self.data[offset : offset + length] if offset // 4096 % 3 == 0 else None

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, later."""
        await asyncio.sleep(0.0002)
        return self.data[offset : offset + length]


def _array(view: Any, at: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(view, np.int32, BLOB // 4, at)


def _parsed(view: Any, at: int) -> object:
    at = at // (2 * BLOB) * 2 * BLOB
    (length,) = struct.unpack_from("<I", view, at + BLOB // 4)
    text = bytes(view[at : at + BLOB // 4])
    first = json.JSONDecoder().raw_decode(text[: text.rindex(b"}") + 1].decode("latin-1"))[0]
    return first["number"], pickle.loads(view[at + BLOB // 4 + 4 : at + BLOB // 4 + 4 + length])[-1]


USES: dict[str, Callable[[Any, int], object]] = {
    "sum": lambda view, at: int(_array(view, at).sum()),
    "small sum": lambda view, at: int(_array(view, at)[:10].sum()),
    "sort": lambda view, at: np.sort(_array(view, at)).tobytes(),
    "fancy": lambda view, at: _array(view, at)[np.arange(0, BLOB // 4, 1024)[::-1]].tolist(),
    "matmul": lambda view, at: (_array(view, at)[: 64 * 64].reshape(64, 64) @ np.ones((64, 4), np.int32)).tolist(),
    "float matmul": lambda view, at: (
        np.frombuffer(view, np.uint8, 128 * 128, at).reshape(128, 128).astype(np.float64) @ np.ones((128, 2))
    ).tolist(),
    "strided": lambda view, at: int(_array(view, at)[::1024].max()),
    "memoryview": lambda view, at: [view[at + step] for step in range(0, BLOB, 4096)],
    "compare": lambda view, at: view[at : at + BLOB] == bytes(view[at : at + BLOB]),
    "struct": lambda view, at: struct.unpack_from("<64q", view, at + 4096 - 64),
    "hashlib": lambda view, at: hashlib.sha256(view[at : at + BLOB]).digest(),
    "small hash": lambda view, at: hashlib.sha256(view[at : at + 100]).digest(),
    "zlib": lambda view, at: zlib.decompress(zlib.compress(view[at : at + BLOB], 1)),
    "crc": lambda view, at: zlib.crc32(view[at : at + BLOB]),
    "re": lambda view, at: [found.start() for found in re.finditer(NEEDLE, view[at : at + BLOB])],
    "join": lambda view, at: b"".join([view[at : at + 5000], view[at + 9000 : at + 9100]]),
    "int": lambda view, at: int.from_bytes(view[at : at + 4200], "little"),
    "json and pickle": _parsed,
}


async def use(kind: str, threads: int, seconds: float) -> None:
    """Scenario: each thread does everything, in an order of its own, in region after region."""
    data = make()
    reference = memoryview(data)
    wrong: list[tuple[str, int]] = []
    done = [0]

    def work(view: memoryview, seed: int) -> None:
        draw = random.Random(seed)
        names = list(USES) * 3
        draw.shuffle(names)
        for name in names:
            at = draw.randrange(0, SIZE // BLOB) * BLOB
            if USES[name](view, at) != USES[name](reference, at):
                wrong.append((name, at))
            done[0] += 1

    def around(region: aiouffd.Region, seed: int) -> None:
        view = memoryview(region)
        workers = [threading.Thread(target=work, args=(view, seed * 100 + n)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert bytes(view) == data
        view.release()

    end, turn = time.monotonic() + seconds, 0
    while time.monotonic() < end or not turn:
        region = aiouffd.Region(SIZE)
        source: Any = aiouffd.BufferSource(data) if kind == "buffer" else Mixed(data)
        readahead = (0, 64 << 10, 2 << 20)[turn % 3]
        async with aiouffd.Monitor(region, source, engine=aiouffd.InThread(), readahead=readahead):
            await asyncio.to_thread(around, region, turn)
        turn += 1
    assert not wrong
    assert done[0] >= threads * len(USES)


@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("kind", ["buffer", "mixed"])
def test_libraries_read_out_of_it(kind: str, threads: int, loop: str) -> None:
    """numpy, memoryview, struct, hashlib, zlib, re, json, pickle: what they make of it is what it must be."""
    play(use, kind, threads, 1.0, loop=loop)


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("kind", ["buffer", "mixed"])
def test_libraries_read_out_of_it_for_minutes(kind: str, threads: int, loop: str) -> None:
    """The same, for longer, beside an application's loop of either kind."""
    play(use, kind, threads, 120.0, loop=loop, deadline=300.0)


class Complains:
    """Has something to say before it has the bytes."""

    size = SIZE

    async def read(self, _: int, length: int) -> bytes:
        """Log a warning."""
        logging.getLogger("aiouffd").warning("trying again")
        return bytes(length)


def logs_an_array() -> None:
    """Scenario."""
    logging.basicConfig(format="%(name)s %(message)s")
    with aiouffd.Monitor(aiouffd.Region(SIZE), Complains(), engine=aiouffd.InThread(stuck_limit=3.0)) as monitor:
        logging.getLogger("users").warning("it begins with %s", np.frombuffer(monitor.region, np.uint8)[:2])


def test_an_array_is_formatted_by_a_handler_of_the_log() -> None:
    """The handler has a lock, for which a record of the loop waits. The loop does not."""
    _, errors = play(logs_an_array)
    assert errors == "users it begins with [0 0]\naiouffd trying again\n"


@pytest.mark.parametrize("options", [["-X", "dev"], ["-X", "faulthandler"]])
def test_libraries_in_modes_of_python(options: list[str]) -> None:
    """With Python's debug hooks, and with faulthandler from the beginning."""
    script = (
        "import asyncio, sys\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "import test_in_thread_users as users\n"
        "asyncio.run(users.use('mixed', 4, 1.0))"
    )
    here = Path(__file__).parent
    command = [sys.executable, *options, "-c", script, str(here), str(here.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env={**os.environ})
    assert result.returncode == 0, result.stderr
