"""Snapshots: writing, opening, and faults of them, beside zstd and obstore alone."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import obstore
import uvloop
import zstandard

import aiouffd
from aiouffd.store import create_sync, open_snapshot
from aiouffd.store.chunks import expanded
from aiouffd.store.codecs import digest, digest_of, expand
from aiouffd.store.index import RECORD, PackName, bitmap, head
from aiouffd.store.manifest import Link, Manifest
from aiouffd.store.snapshot import index_path
from benchmarks.contestants import PAGE, child, monitored, warm
from benchmarks.native import touch
from benchmarks.row import Bar, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["snapshot_rows"]

MIB = 1 << 20
_CHUNK = 64 << 10
_WORDS = 4096
_TEXT = 16 * MIB


@functools.cache
def place() -> Path:
    """Return a folder that is removed when the benchmarks end."""
    folder = tempfile.TemporaryDirectory(prefix="aiouffd-snapshots-", dir="/var/tmp")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def image(size: int) -> Path:
    """Return a file whose first word in page n is n + 1. The others are words of a text: zstd makes a third of it."""
    rng = np.random.default_rng(5)
    rank = 1 / np.arange(1, _WORDS + 1) ** 1.2
    text = rng.integers(0, 1 << 63, _WORDS, np.uint64)[rng.choice(_WORDS, _TEXT // 8, p=rank / rank.sum())]
    path = place() / f"{size}.mem"
    with path.open("wb") as file:
        for at in range(0, size, _TEXT):
            pages = (text ^ np.uint64(at)).reshape(-1, PAGE // 8)[: (size - at) // PAGE]
            pages[:, 0] = np.arange(at // PAGE + 1, at // PAGE + 1 + len(pages))
            pages.tofile(file)
    return path


@functools.cache
def snapshot(size: int, codec: str = "zstd") -> Path:
    """Return the manifest of a snapshot of it, in a store of its own."""
    path = place() / f"{size}-{codec}" / "x.snap"
    create_sync(image(size), path, codec=codec)
    return path


@functools.cache
def deep(size: int, depth: int) -> Path:
    """Return the manifest of the last of many layers, each of which has changed one chunk. They are not synced."""
    memory = bytearray(image(size).read_bytes())
    store = place() / f"deep-{depth}"
    numbers = random.Random(1)
    with mock.patch.object(os, "fsync"):
        create_sync(memory, store / "0.snap")
        for number in range(1, depth):
            at = numbers.randrange(size // PAGE) * PAGE + 2 * PAGE // 3
            memory[at : at + 4] = number.to_bytes(4, "little")
            create_sync(memory, store / f"{number}.snap", base=store / f"{number - 1}.snap")
    return store / f"{depth - 1}.snap"


# Writing


def written(size: int) -> float:
    """Ours: a snapshot of a local file; seconds."""
    source = image(size)
    with tempfile.TemporaryDirectory(dir=place()) as store:
        before = time.perf_counter()
        create_sync(source, Path(store) / "x.snap")
        return time.perf_counter() - before


def by_zstd(size: int) -> float:
    """The same file by zstd with two threads; seconds."""
    source = image(size)
    with tempfile.TemporaryDirectory(dir=place()) as folder:
        before = time.perf_counter()
        subprocess.run(["zstd", "-q", "-3", "-T2", source, "-o", f"{folder}/out"], check=True)
        return time.perf_counter() - before


def layer_written(size: int, *, known: bool = False) -> float:
    """Ours: a second layer, one in a hundred chunks of which has changed; known: it is told which. Seconds."""
    with tempfile.TemporaryDirectory(dir=place()) as folder:
        changed = Path(folder) / "changed.mem"
        shutil.copyfile(image(size), changed)
        places = [
            chunk * _CHUNK + 100 for chunk in random.Random(2).sample(range(size // _CHUNK), size // _CHUNK // 100)
        ]
        with changed.open("r+b") as file:
            for at in places:
                file.seek(at)
                file.write(b"changed")
        create_sync(image(size), Path(folder) / "a.snap")
        ranges = [aiouffd.Range(at, 7) for at in places] if known else None
        before = time.perf_counter()
        create_sync(changed, Path(folder) / "b.snap", base=Path(folder) / "a.snap", changed=ranges)
        return time.perf_counter() - before


# Depth


def opened(path: Path) -> float:
    """Ours: until the size is known, the mean of 100 times, since one takes 0.2 ms; seconds."""
    before = time.perf_counter()
    for _ in range(100):
        assert aiouffd.SnapshotSource(path).size
    return (time.perf_counter() - before) / 100


def random_faults(path: Path, size: int, count: int) -> float:
    """Ours: random pages, one in each of as many chunks, cold but for the page cache; seconds."""
    warm(size)
    with monitored(size, aiouffd.SnapshotSource(path), readahead=0) as arena:
        return touch(arena.address, one_in_each_chunk(size, count))


def one_in_each_chunk(size: int, count: int) -> np.ndarray:
    """Return the numbers of random pages, each in another chunk."""
    rng = np.random.default_rng(7)
    chunks = rng.permutation(size // _CHUNK)[:count]
    return (chunks * (_CHUNK // PAGE) + rng.integers(0, _CHUNK // PAGE, len(chunks))).astype(np.uint32)


# Far


class _Server(asyncio.Protocol):
    """Answers requests for ranges of files, late, as if one line carried so many bytes a second for all connections."""

    free_at = 0.0  # when the line is free again; of all connections

    def __init__(self, folder: Path, latency: float, rate: float) -> None:
        self._folder, self._latency, self._rate = folder, latency, rate

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Answer; a request is small, and comes in one piece."""
        target, start, stop = _ASKS.search(data).groups()  # type: ignore[union-attr]
        with (self._folder / target.decode()).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first, last = int(start), min(int(stop) + 1, size)
            body = os.pread(file.fileno(), last - first, first)
        head = f'HTTP/1.1 206 Partial Content\r\nContent-Length: {len(body)}\r\nETag: "{size}"\r\n'
        answer = f"{head}Content-Range: bytes {first}-{last - 1}/{size}\r\n\r\n".encode() + body
        loop = asyncio.get_running_loop()
        sent = max(loop.time() + self._latency, _Server.free_at) + len(body) / self._rate
        _Server.free_at = sent
        if sent > loop.time():
            loop.call_at(sent, self._transport.write, answer)
        else:
            self._transport.write(answer)


_ASKS = re.compile(rb"GET /(\S+) HTTP.*[Rr]ange: bytes=(\d+)-(\d+)", re.DOTALL)


@contextlib.contextmanager
def served(folder: Path, latency: float, rate: float = math.inf) -> Iterator[str]:
    """Serve a folder from a process of its own; yield its URL."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:

        async def main() -> None:
            loop = asyncio.get_running_loop()
            await loop.create_server(lambda: _Server(folder, latency, rate), sock=listening)
            await asyncio.Event().wait()

        with child(lambda: uvloop.run(main())):
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def whole(path: Path, size: int, latency: float, rate: float) -> float:
    """Ours: all of a snapshot, or of a plain file, over a line; seconds, opening included."""
    warm(size)
    with served(path.parent, latency, rate) as url:
        before = time.perf_counter()
        made = aiouffd.SnapshotSource if path.suffix == ".snap" else aiouffd.ObjectSource
        with monitored(size, made(f"{url}/{path.name}")) as arena:
            assert arena.monitor is not None
            arena.monitor.prefetch_sync(0, size)
        return time.perf_counter() - before


def far_faults(path: Path, size: int, count: int, latency: float) -> float:
    """Ours: random pages of chunks that are far, one after the other; seconds."""
    with (
        served(path.parent, latency) as url,
        monitored(size, aiouffd.SnapshotSource(f"{url}/{path.name}"), readahead=0) as arena,
    ):
        touch(arena.address, np.zeros(1, np.uint32))
        return touch(arena.address, one_in_each_chunk(size, count))


def far_chunks(path: Path, size: int, count: int, latency: float) -> float:
    """The same chunks, fetched by obstore and decompressed, without memory to fill; seconds."""
    context = multiprocessing.get_context("spawn")  # this process may have threads of obstore
    with served(path.parent, latency) as url, ProcessPoolExecutor(1, context) as pool:
        return pool.submit(
            _fetch, url, str(path), (one_in_each_chunk(size, count) // (_CHUNK // PAGE)).tolist()
        ).result()


def _fetch(url: str, path: str, chunks: list[int]) -> float:
    index = open_snapshot(path).index
    options: Any = {"allow_http": True}
    store = obstore.store.HTTPStore.from_url(url, client_options=options)

    async def one(chunk: int) -> None:
        record = index.find(chunk)
        assert record is not None
        pack = index.pack(record.pack).path
        frame = await obstore.get_range_async(store, pack, start=record.offset, length=record.length)
        data = expand(record.codec, memoryview(frame), index.length_of(chunk))
        assert digest(data) == record.hash

    async def main() -> float:
        await one(0)
        before = time.perf_counter()
        for chunk in chunks:
            await one(chunk)
        return time.perf_counter() - before

    return uvloop.run(main())


# Decompression


def _frames(size: int) -> list[tuple[Any, bytes]]:
    opened = open_snapshot(snapshot(size))
    records = list(opened.index.find_all())
    return [
        (record, opened.store.read(opened.index.pack(record.pack).path, record.offset, record.offset + record.length))
        for record in records
    ]


def decompressed(size: int) -> float:
    """Ours: each chunk decompressed and checked, as a worker does it; seconds of processor time."""
    index, frames = open_snapshot(snapshot(size)).index, _frames(size)
    before = time.thread_time()
    for record, frame in frames:
        assert len(expanded(index, record, memoryview(frame), "x")) == _CHUNK
    return time.thread_time() - before


def by_zstd_alone(size: int) -> float:
    """The same frames by zstd's library alone; seconds of processor time."""
    context, frames = zstandard.ZstdDecompressor(), _frames(size)
    before = time.thread_time()
    for _, frame in frames:
        assert len(context.decompress(frame)) == _CHUNK
    return time.thread_time() - before


def by_zstd_command(size: int) -> float:
    """The same frames in one file by `zstd -d`, in one thread; seconds of processor time."""
    path = place() / f"{size}.zst"
    path.write_bytes(b"".join(frame for _, frame in _frames(size)))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["zstd", "-q", "-d", "-c", "--single-thread", path], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# Memory


@functools.cache
def large(size: int) -> Path:
    """Return the manifest of an image of which no chunk is zeros, and whose packs are not there."""
    chunks = size // _CHUNK
    store = place() / f"large-{size}"
    (store / "indexes").mkdir(parents=True)
    first = head(size, _CHUNK, [PackName(bytes(16), bytes(16), 1 << 31)], b"\xff" * len(bitmap(size, _CHUNK)))
    records = np.zeros((chunks, RECORD.size // 4), np.uint32)
    records[:, 1], records[:, 2] = 1 << 20, 1000 | 1 << 24
    link = Link(digest_of([first, records.view(np.uint8).reshape(-1)], 32).hex(), len(first) + records.nbytes)
    with (store / index_path(link)).open("wb") as file:
        file.write(first)
        records.tofile(file)
    (store / "x.snap").write_bytes(Manifest(size, PAGE, _CHUNK, "zstd", link).encode())
    return store / "x.snap"


def resident(size: int) -> float:
    """Ours: MiB of the pager that has opened it, and looked for 10,000 of its chunks, whose pack is not there."""
    with monitored(size, aiouffd.SnapshotSource(large(size))) as arena:
        assert arena.monitor is not None
        for chunk in np.random.default_rng(1).integers(0, size // _CHUNK, 10_000):
            with contextlib.suppress(aiouffd.StoreError):
                arena.monitor.prefetch_sync(int(chunk) * _CHUNK, _CHUNK)
        status = Path(f"/proc/{arena.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def snapshot_rows(*, quick: bool) -> Iterator[Row]:
    """Images in compressed chunks and in layers."""
    small, large_size, depth = (16 * MIB, 32 * MIB, 10) if quick else (64 * MIB, 1024 * MIB, 1000)
    middle, count = (32 * MIB, 50) if quick else (256 * MIB, 1000)
    way = "local to local"

    def made(arguments: tuple[Any, ...]) -> list[Any]:  # when the row is run: others need no such files
        return [argument() if callable(argument) else argument for argument in arguments]

    def ms(once: Callable[..., float], *arguments: Any) -> Callable[[], float]:
        return lambda: once(*made(arguments)) * 1e3

    def us(once: Callable[..., float], *arguments: Any) -> Callable[[], float]:
        return lambda: once(*made(arguments)) / arguments[2] * 1e6

    if shutil.which("zstd") is not None:
        contestants = {"aiouffd": ms(written, large_size), "zstd -T2": ms(by_zstd, large_size)}
        yield Row(
            "snapshot-create",
            f"snapshot create of {large_size // MIB} MiB, {way}",
            "ms",
            contestants,
            (Bar("zstd -T2", 1.1),),
        )
    contestants = {"aiouffd": ms(layer_written, large_size), "the first": ms(written, large_size)}
    yield Row(
        "snapshot-layer", "a second layer, 1 % of its chunks changed", "ms", contestants, (Bar("the first", 0.15),)
    )
    contestants = {
        "aiouffd": lambda: layer_written(large_size, known=True) * 1e3,
        "the first": ms(written, large_size),
    }
    yield Row(
        "snapshot-known", "the same, where what has changed is known", "ms", contestants, (Bar("the first", 0.03),)
    )
    one, last = functools.partial(deep, small, 1), functools.partial(deep, small, depth)
    contestants = {"aiouffd": ms(opened, last), "depth 1": ms(opened, one)}
    yield Row("snapshot-open", f"a snapshot of depth {depth} is opened", "ms", contestants, (Bar("depth 1", 1.2),))
    faults = small // _CHUNK
    contestants = {"aiouffd": us(random_faults, last, small, faults), "depth 1": us(random_faults, one, small, faults)}
    yield Row(
        "snapshot-depth",
        f"random 4 KiB of a cold chunk, depth {depth}",
        "us/page",
        contestants,
        (Bar("depth 1", 1.2),),
        setup="readahead=0",
    )
    far = functools.partial(snapshot, middle)
    contestants = {
        "aiouffd": ms(whole, far, middle, 0.005, 100 * MIB),
        "uncompressed": ms(whole, functools.partial(image, middle), middle, 0.005, 100 * MIB),
    }
    yield Row(
        "snapshot-whole",
        f"{middle // MIB} MiB that compress 3:1, 5 ms away, 100 MiB/s",
        "ms",
        contestants,
        (Bar("uncompressed", 0.5),),
        repeats=3,
    )
    contestants = {
        "aiouffd": us(far_faults, far, middle, count, 0.001),
        "obstore alone": us(far_chunks, far, middle, count, 0.001),
    }
    yield Row(
        "snapshot-far",
        "random 4 KiB of a cold chunk, 1 ms away",
        "us/page",
        contestants,
        (Bar("obstore alone", 1.2),),
        setup="readahead=0",
    )
    contestants = {"aiouffd": ms(decompressed, middle), "zstd alone": ms(by_zstd_alone, middle)}
    bars = [Bar("zstd alone", 1.15)]
    if shutil.which("zstd") is not None:
        contestants["zstd -d"] = ms(by_zstd_command, middle)
        bars.append(Bar("zstd -d", 1.15))
    yield Row(
        "snapshot-zstd",
        f"processor time: decompress and check {middle // MIB} MiB",
        "ms",
        contestants,
        tuple(bars),
    )
    if not quick:
        contestants = {"aiouffd": lambda: resident(1 << 40), "1 GiB + 10 MiB": lambda: resident(1 << 30) + 10}
        yield Row(
            "snapshot-memory",
            "pager's memory, a snapshot of 1 TiB, 10,000 random chunks, against 1 GiB plus 10 MiB",
            "MiB",
            contestants,
            (Bar("1 GiB + 10 MiB", 1.0),),
            repeats=3,
        )
