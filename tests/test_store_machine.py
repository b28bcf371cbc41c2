"""Stores of snapshots against a model: a dictionary from name to bytes."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from snapshots import CHUNK, an_image, damage
from test_cached_source import Machine

import aiouffd
from aiouffd.store import copy_sync, create_sync, diff_sync, extract_sync, flatten_sync, gc_sync, layer, verify_sync
from aiouffd.store.folder import Folder

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = st.sampled_from(["a", "b", "c", "d"])
STORES = st.sampled_from(["one", "two"])
CODECS = st.sampled_from(["none", "zstd", "lz4"])


class Stores(RuleBasedStateMachine):
    """Two stores in folders. Objects are damaged in a copy only, so that all else goes on."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.model: dict[tuple[str, str], bytes] = {}
        self.small = mock.patch.object(layer, "PACK_BYTES", 3 * CHUNK)
        self.small.start()
        for name in ("one", "two"):
            (self.place / name).mkdir()

    def teardown(self) -> None:
        """Remove all."""
        self.small.stop()
        shutil.rmtree(self.place)

    def path(self, store: str, name: str) -> Path:
        """Return where a manifest is."""
        return self.place / store / f"{name}.snap"

    def put(self, store: str, name: str, data: bytes, **options: object) -> None:
        """Write a snapshot, which may be there."""
        replace = (store, name) in self.model
        create_sync(data, self.path(store, name), replace=replace, **options)  # type: ignore[arg-type]
        self.model[store, name] = data

    @rule(
        store=STORES,
        name=NAMES,
        seed=st.integers(0, 5),
        chunks=st.integers(0, 9),
        tail=st.integers(1, 5000),
        codec=CODECS,
        chunk=st.sampled_from([CHUNK, 2 * CHUNK, 4 * CHUNK]),
    )
    def create(self, store: str, name: str, seed: int, chunks: int, tail: int, codec: str, chunk: int) -> None:
        """A new one."""
        self.put(store, name, an_image(seed, chunks, tail), codec=codec, chunk_size=chunk)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), name=NAMES, codec=CODECS, grows=st.integers(-3 * CHUNK, 3 * CHUNK))
    def layer(self, data: st.DataObject, name: str, codec: str, grows: int) -> None:
        """One upon another, with some bytes changed, and longer or shorter."""
        store, base = data.draw(st.sampled_from(sorted(self.model)))
        image = bytearray(self.model[store, base])
        for at in data.draw(st.lists(st.integers(0, len(image) - 1), max_size=3)):
            image[at] ^= 1 + at % 255
        image = image + bytes([7]) * grows if grows > 0 else image[: max(len(image) + grows, 1)]
        self.put(store, name, bytes(image), base=self.path(store, base), codec=codec)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), to=STORES, name=NAMES, flat=st.booleans())
    def transfer(self, data: st.DataObject, to: str, name: str, flat: bool) -> None:
        """A copy, or one without layers; perhaps in the place of itself."""
        store, source = data.draw(st.sampled_from(sorted(self.model)))
        move = flatten_sync if flat else copy_sync
        move(self.path(store, source), self.path(to, name), replace=(to, name) in self.model)
        self.model[to, name] = self.model[store, source]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """A manifest."""
        store, name = data.draw(st.sampled_from(sorted(self.model)))
        self.path(store, name).unlink()
        del self.model[store, name]

    @rule(store=STORES, grace=st.sampled_from([0.0, 3600.0]))
    def collect(self, store: str, grace: float) -> None:
        """What nothing names."""
        gc_sync(self.place / store, grace=grace)

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def compare(self, data: st.DataObject) -> None:
        """Two of them differ where they do."""
        one, other = (data.draw(st.sampled_from(sorted(self.model))) for _ in range(2))
        found = diff_sync(self.path(*one), self.path(*other))
        left, right = bytearray(self.model[one]), bytearray(self.model[other])
        assert bool(found) == (left != right)
        for piece in found:
            size = max(0, min(piece.end, len(left), len(right)) - piece.start)
            left[piece.start : piece.start + size] = right[piece.start : piece.start + size]
            shorter = min(len(left), len(right))
            if piece.end > shorter >= piece.start:
                del left[shorter:], right[shorter:]
        assert left == right

    @precondition(lambda self: self.model)
    @rule(data=st.data(), seed=st.integers(0, 1 << 30), cut=st.booleans())
    def harm(self, data: st.DataObject, seed: int, cut: bool) -> None:
        """One object is damaged or cut, in a copy: each read is right or a StoreError."""
        store, name = data.draw(st.sampled_from(sorted(self.model)))
        rng = random.Random(seed)
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(self.place / store, Path(folder) / "copy")
            files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
            victim = rng.choice(files)
            size = victim.stat().st_size
            if cut:
                victim.write_bytes(victim.read_bytes()[: rng.randrange(size)])
            else:
                damage(victim, rng.randrange(size), rng.randrange(1, 256))
            asyncio.run(read_some(copy / f"{name}.snap", self.model[store, name], rng, whole=False))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), seed=st.integers(0, 1 << 30))
    def flaky(self, data: st.DataObject, seed: int) -> None:
        """The store fails, answers short, late, or with a wrong bit, for a while: right or a StoreError, then right."""
        key = data.draw(st.sampled_from(sorted(self.model)))
        asyncio.run(read_flaky(self.path(*key), self.model[key], random.Random(seed)))

    @invariant()
    def all_are_right(self) -> None:
        """Each snapshot, by reads of any kind, and by one check of all."""
        Stores.steps += 1
        rng = random.Random(len(self.model))
        for (store, name), data in self.model.items():
            asyncio.run(read_some(self.path(store, name), data, rng, whole=True))
        if self.model:
            place = self.path(*rng.choice(sorted(self.model)))
            assert verify_sync(place) == []
            extract_sync(place, self.place / "out")
            assert (self.place / "out").read_bytes() == self.model[place.parent.name, place.stem]


def flaky_read(rng: random.Random) -> Callable[[Folder, str, int, int], bytes]:
    """Return what reads an object as a bad store does."""
    read = Folder.read

    def odd(folder: Folder, path: str, start: int, stop: int) -> bytes:
        found = read(folder, path, start, stop)
        match rng.randrange(6):
            case 0:
                raise aiouffd.StoreError(folder.name(path), 0, 0, "the store is on fire")
            case 1:
                return found[: rng.randrange(len(found) + 1)]
            case 2:
                at = rng.randrange(len(found))
                return found[:at] + bytes([found[at] ^ 1 << rng.randrange(8)]) + found[at + 1 :]
            case 3:
                time.sleep(rng.random() * 0.003)
        return found

    return odd


async def read_flaky(place: Path, data: bytes, rng: random.Random) -> None:
    """Read from a source whose store is bad, and from the same once it is well: no failure stays."""
    source = aiouffd.SnapshotSource(place, kept=2 * CHUNK)
    await source.prepare()
    with mock.patch.object(Folder, "read", flaky_read(rng)):
        outcomes = await asyncio.gather(*(read_one(source, data, rng) for _ in range(8)), return_exceptions=True)
        while source._chunks is not None and source._chunks._flights:  # noqa: ASYNC110 - threads make no event
            await asyncio.sleep(0.001)
    assert not [outcome for outcome in outcomes if outcome is not None and type(outcome) is not aiouffd.StoreError]
    await asyncio.gather(*(read_one(source, data, rng) for _ in range(8)))
    await source.aclose()


async def read_one(source: aiouffd.SnapshotSource, data: bytes, rng: random.Random) -> None:
    """Read a range, by a fault or ahead of it, and compare."""
    offset = rng.randrange(len(data))
    length = rng.randrange(1, min(4 * CHUNK, len(data) - offset) + 1)
    read = source.read if rng.random() < 0.5 else source.read_ahead
    at_hand = source.read_nowait(offset, length)
    found = await read(offset, length) if at_hand is None else at_hand
    assert bytes(found) == data[offset : offset + length]
    zeros = source.hole(offset, length)
    assert not any(data[offset : offset + zeros])


async def read_some(place: Path, data: bytes, rng: random.Random, *, whole: bool) -> None:
    """Read several ranges at once, by faults and ahead, with little that is kept; whole: there may be no error."""
    source = aiouffd.SnapshotSource(place, kept=rng.choice([0, 2 * CHUNK, 32 << 20]))

    try:
        await source.prepare()
    except aiouffd.StoreError:
        assert not whole
        return
    if source.size != len(data):
        assert not whole  # a manifest may be damaged to another one that can be
        return
    outcomes = await asyncio.gather(*(read_one(source, data, rng) for _ in range(6)), return_exceptions=True)
    await source.aclose()
    allowed = () if whole else (aiouffd.StoreError,)
    assert not [outcome for outcome in outcomes if outcome is not None and not isinstance(outcome, allowed)]


class TestStores(Stores.TestCase):  # type: ignore[misc,valid-type]
    """The machine, as CI runs it."""

    settings = settings(max_examples=8, stateful_step_count=20)


@pytest.mark.nightly
@pytest.mark.timeout(5000)
def test_for_an_hour() -> None:
    """Both machines in turn, of stores and of a cache. AIOUFFD_TEST_SECONDS says how long; the steps are printed.

    With `-o faulthandler_timeout=0`: it is longer than any other test.
    """
    end = time.monotonic() + float(os.environ.get("AIOUFFD_TEST_SECONDS", "3600"))
    rules = settings(max_examples=20, stateful_step_count=60, database=None, derandomize=False, deadline=None)
    rounds = 0
    while time.monotonic() < end:
        for machine in (Stores, Machine):
            run_state_machine_as_test(machine, settings=rules)  # type: ignore[no-untyped-call, unused-ignore]
        rounds += 1
        print(f"{rounds} rounds: {Stores.steps} steps of stores, {Machine.steps} of a cache", flush=True)
