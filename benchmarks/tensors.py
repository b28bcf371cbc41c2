"""One tensor of many, and rows of a table, behind HTTP: what others fetch, and how long it takes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import importlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import socket
import struct
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import obstore
import uvloop

import aiouffd
from aiouffd import formats
from aiouffd.kernel.memory import SealedMemory
from benchmarks.far import served
from benchmarks.row import MIB, Bar, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["tensor_rows"]

_TENSORS, _CHOSEN = 64, "layers.33.weight"
_ROWS, _WIDTH = 1000, 1024  # a row has 4 KiB
_AT_ONCE = 64
_DELAY = 0.005


@functools.cache
def _model(size: int) -> SealedMemory:
    """Return a safetensors file; the elements of tensor n are n."""
    each = size // _TENSORS
    header = {
        f"layers.{n}.weight": {"dtype": "F32", "shape": [each // 4], "data_offsets": [n * each, (n + 1) * each]}
        for n in range(_TENSORS)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    tensors = [np.full(each // 4, n, np.float32).tobytes() for n in range(_TENSORS)]
    return SealedMemory.from_buffer(memoryview(b"".join([struct.pack("<Q", len(text)), text, *tensors])))


def _a_pager(port: int) -> contextlib.AbstractContextManager[aiouffd.Region]:
    """Have a pager run that has served a URL: what a program pays once is the row `first`."""
    return aiouffd.open(f"http://127.0.0.1:{port}/file")


def _lazily(port: int, _: int) -> int:
    with aiouffd.open(f"http://127.0.0.1:{port}/file") as region:
        file = formats.Safetensors(region)
        file.prefetch_tensor_sync(_CHOSEN)
        _check(file[_CHOSEN])
        fetched: int = region.monitor.statistics().bytes_fetched
        return fetched


@contextlib.contextmanager
def _download(port: int, size: int) -> Iterator[str]:
    """Fetch the file by one request; yield its path."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/file", headers={"Range": f"bytes=0-{size - 1}"})
        shutil.copyfileobj(connection.getresponse(), file, MIB)
        file.flush()
        yield file.name


def _downloaded(port: int, size: int) -> int:
    from safetensors import safe_open  # noqa: PLC0415 - not every machine has it

    with _download(port, size) as path, safe_open(path, framework="np") as model:
        _check(model.get_tensor(_CHOSEN))
    return size


def _through_fsspec(port: int, size: int) -> int:
    import fsspec  # noqa: PLC0415 - as above

    filesystem = fsspec.filesystem("http")
    with filesystem.open(f"http://127.0.0.1:{port}/file", size=size) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start, end = json.loads(file.read(length))[_CHOSEN]["data_offsets"]
        file.seek(8 + length + start)
        _check(np.frombuffer(file.read(end - start), np.float32))
        fetched: int = file.cache.total_requested_bytes
        return fetched


def _all(port: int, size: int) -> int:
    _check_all(formats.load_file(f"http://127.0.0.1:{port}/file"))
    return size


def _all_downloaded(port: int, size: int) -> int:
    from safetensors.torch import load_file  # noqa: PLC0415 - as above

    with _download(port, size) as path:
        _check_all(load_file(path))
    return size


def _check_all(tensors: Mapping[str, Any]) -> None:
    """Touch each page."""
    for number in range(_TENSORS):
        every = tensors[f"layers.{number}.weight"][::1024]
        assert every.sum().item() == number * len(every)


def _check(tensor: np.ndarray) -> None:
    assert tensor.min() == tensor.max() == 33


def _one(use: Callable[[int, int], int], size: int, index: int, *needs: str) -> float:
    """Return what it takes from the URL to the tensor: milliseconds, or MiB; not what it takes to import libraries."""
    for name in needs:
        importlib.import_module(name)
    model = _model(size)
    length = os.fstat(model.fd).st_size
    with served(model.fd, length) as port, _a_pager(port):
        before = time.perf_counter()
        fetched = use(port, length)
        return ((time.perf_counter() - before) * 1e3, fetched / MIB)[index]


# Rows of a table


@functools.cache
def _table(size: int) -> int:
    """Return the descriptor of a sparse .npy file; each row that is asked for begins with its number."""
    fd = os.memfd_create("table")
    with open(fd, "wb", closefd=False) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (size // (4 * _WIDTH), _WIDTH)}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
    os.ftruncate(fd, begin + size)
    for row in _chosen(size).tolist():
        os.pwrite(fd, struct.pack("<f", row), begin + row * 4 * _WIDTH)
    return fd


@functools.cache
def _chosen(size: int) -> np.ndarray:
    return np.random.default_rng(1).choice(size // (4 * _WIDTH), _ROWS, replace=False)


@functools.cache
def _port() -> int:
    """Return a port that nobody listens at: a recording carries bytes of one URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _rows(size: int, replay: Path | None = None, record: aiouffd.Recording | None = None) -> float:
    """Ours: a prefetch of the rows, or touches that a replay of the last run comes before, from opening the URL on."""
    fd, rows = _table(size), _chosen(size)
    with served(fd, os.fstat(fd).st_size, delay=_DELAY, port=_port()) as port, _a_pager(port):
        before = time.perf_counter()
        with aiouffd.open(f"http://127.0.0.1:{port}/file", readahead=0, replay=replay, record=record) as region:
            if record is not None:
                assert region[0] == 0x93  # the header is prefetched, and recorded are touches
            file = formats.Npy(region)
            if replay is None and record is None:
                file.prefetch_rows_sync("array", rows)
            assert np.array_equal(file.array[rows].sum(axis=1), rows.astype(np.float32))
            return time.perf_counter() - before


def _ms(size: int, replay: Path | None = None) -> float:
    if replay is not None and not replay.exists():
        _rows(size, record=aiouffd.Recording(replay, pages=True))
    return _rows(size, replay) * 1e3


def _obstore_alone(size: int) -> float:
    """The same bytes by obstore alone, in a process of its own."""
    fd = _table(size)
    with (
        served(fd, os.fstat(fd).st_size, delay=_DELAY) as port,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(_get, port, _chosen(size).tolist()).result()


def _get(port: int, rows: list[int]) -> float:
    """As ours: from the URL on, until the sum of each row is there."""

    async def main() -> float:
        before = time.perf_counter()
        options: obstore.store.ClientConfig = {"allow_http": True}
        store = obstore.store.HTTPStore.from_url(f"http://127.0.0.1:{port}", client_options=options)
        await obstore.get_range_async(store, "file", start=0, length=128)
        left, array = iter(enumerate(rows)), np.empty((len(rows), _WIDTH), np.float32)

        async def work() -> None:
            for at, row in left:
                got = await obstore.get_range_async(store, "file", start=128 + row * 4 * _WIDTH, length=4 * _WIDTH)
                array[at] = np.frombuffer(memoryview(got), np.float32)

        await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
        assert np.array_equal(array.sum(axis=1), np.array(rows, np.float32))
        return time.perf_counter() - before

    return uvloop.run(main())


def _left_out(contestant: str, *needed: str) -> dict[str, str]:
    """Return why a contestant cannot run, if it lacks a library."""
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    return {contestant: f"{', '.join(lacking)}: not installed"} if lacking else {}


def tensor_rows(*, quick: bool) -> Iterator[Row]:
    """Parts of files of arrays."""
    size, table = (16 * MIB, 64 * MIB) if quick else (256 * MIB, 4096 * MIB)
    ways = {"aiouffd": _lazily, "download": _downloaded, "fsspec": _through_fsspec}
    for name, unit, index in (("tensor", "ms", 0), ("tensor-bytes", "MiB", 1)):
        yield Row(
            name,
            f"one tensor of {_TENSORS} of a safetensors file of {size // MIB} MiB behind HTTP",
            unit,
            {way: functools.partial(_one, use, size, index) for way, use in ways.items()},
            (Bar("download", 0.1), Bar("fsspec", 0.5)),
            left_out=_left_out("download", "safetensors") | _left_out("fsspec", "fsspec", "aiohttp"),
            setup="formats.Safetensors, prefetch_tensor",
        )
    yield Row(
        "load-file",
        f"all tensors of a safetensors file of {size // MIB} MiB behind HTTP, as torch has them",
        "ms",
        {
            "aiouffd": functools.partial(_one, _all, size, 0, "torch"),
            "download, load_file": functools.partial(_one, _all_downloaded, size, 0, "safetensors.torch"),
        },
        (Bar("download, load_file", 0.8),),
        left_out=_left_out("aiouffd", "torch") | _left_out("download, load_file", "safetensors"),
        setup="formats.load_file",
    )
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace")
        peer = f"obstore, {_AT_ONCE} at once"
        for name, words, setup, replay, bar in (
            ("rows", "", "formats.Npy, prefetch_rows, readahead=0", None, 1.2),
            (
                "rows-replay",
                ", replayed from a recording",
                "readahead=0, record=Recording(pages=True), replay=",
                trace,
                0.2,
            ),
        ):
            yield Row(
                name,
                f"{_ROWS} random rows of an .npy file of {table // MIB} MiB behind 5 ms{words}",
                "ms",
                {
                    "aiouffd": functools.partial(_ms, table, replay),
                    peer: lambda: _obstore_alone(table) * 1e3,
                },
                (Bar(peer, bar),),
                setup=setup,
            )
