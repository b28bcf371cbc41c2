"""Files of arrays behind HTTP: a prefetch fetches what it is asked for, and nothing else. The server counts."""

from __future__ import annotations

import asyncio
import contextlib
import io
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from array_files import npy, npz, tensors
from scenario import play

import aiouffd
from aiouffd import formats
from examples.page_server import PageServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGE = 4096
ENGINES = {"pager": aiouffd.Pager, "thread": aiouffd.InThread}
MODEL: dict[str, Any] = {f"w{n}": np.full((100, 777), n, np.float32) for n in range(64)}


@contextlib.asynccontextmanager
async def served(data: bytes, engine: str) -> AsyncIterator[tuple[Any, Any]]:
    """Serve a file, map it, and yield (region, what returns how many bytes were sent since its last call)."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "file").write_bytes(data)
        server = PageServer(Path(directory))
        listening = await server.serve("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/file"

        def sent() -> int:
            count, server.bytes_sent = server.bytes_sent, 0
            return count

        async with aiouffd.open(url, engine=ENGINES[engine]()) as region:
            yield region, sent
        listening.close()


def pages(size: int, *ranges: tuple[int, int]) -> int:
    """Return how many bytes the pages of (start, length) ranges have, in a file of a size."""
    found = {page for start, length in ranges for page in range(start // PAGE, -(-(start + length) // PAGE))}
    return sum(min(PAGE, size - page * PAGE) for page in found)


async def one_tensor(engine: str) -> None:
    """Scenario: the header, then a tensor of 64, then a slice, then two more."""
    data = tensors(MODEL, dict.fromkeys(MODEL, "F32"))
    async with served(data, engine) as (region, sent):
        file: Any = await asyncio.to_thread(formats.Safetensors, region)
        head = file.info("w0").start
        assert sent() == pages(len(data), (0, head))
        for what in (["w33"], ["w63", "w2"]):
            await file.prefetch_tensor(*what)
            places = [(file.info(name).start, file.info(name).length) for name in what]
            assert sent() == pages(len(data), *places)
            assert all((file[name] == MODEL[name]).all() for name in what)
        await file.prefetch_tensor(file["w40"][50:60])
        assert sent() == pages(len(data), (file.info("w40").start + 50 * 777 * 4, 10 * 777 * 4))
        assert (file["w40"][50:60] == 40).all()
        assert sent() == 0
        assert region.monitor.statistics().faults == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_one_tensor_of_many(engine: str, loop: str) -> None:
    """Bytes fetched are those of its pages: none twice, none beside them, and no fault is taken."""
    play(one_tensor, engine, loop=loop)


async def rows() -> None:
    """Scenario: some rows of a table."""
    table = np.arange(5000 * 300, dtype=np.uint32).reshape(5000, 300)
    data = npy(table)
    async with served(data, "pager") as (region, sent):
        file = await asyncio.to_thread(formats.Npy, region)
        assert sent() == PAGE
        chosen = np.random.default_rng(1).integers(10, 5000, 400)  # the first page came with the header
        await file.prefetch_tensor(*(file.array[row] for row in chosen))
        places = [(file.info("array").start + int(row) * 1200, 1200) for row in chosen]
        assert sent() == pages(len(data), *places)
        assert (file.array[chosen] == table[chosen]).all()
        assert sent() == 0


def test_rows_of_a_table() -> None:
    """As many bytes as their pages have."""
    play(rows)


def checkpoint() -> bytes:
    """Return a file of torch.save, made without torch."""
    from test_checkpoint import saved, tensor

    storages = {str(n): array.tobytes() for n, array in enumerate(MODEL.values())}
    content = {name: tensor("FloatStorage", str(n), 77700, 0, (100, 777), (777, 1)) for n, name in enumerate(MODEL)}
    return saved(content, storages)


async def members(kind: str) -> None:
    """Scenario: members of a zip file, whose headers are spread over it."""
    data = npz(**MODEL) if kind == "Npz" else checkpoint()
    async with served(data, "pager") as (region, sent):
        file = await asyncio.to_thread(getattr(formats, kind), region)
        assert list(file) == list(MODEL)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            directory = len(data) - archive.start_dir
        assert sent() < directory + 16 * PAGE
        await file.prefetch_tensor("w7", "w50")
        places = [(file.info(name).start, file.info(name).length) for name in ("w7", "w50")]
        assert sent() <= pages(len(data), *places) + 4 * PAGE
        assert all((file[name] == MODEL[name]).all() for name in ("w7", "w50"))
        assert sent() == 0


@pytest.mark.parametrize("kind", ["Npz", "Checkpoint"])
def test_members_of_a_zip_file(kind: str) -> None:
    """The directory, the headers of what is asked for, and its bytes."""
    play(members, kind)


def mapped() -> None:
    """Scenario: a model that keeps its region, in a program without a loop; a source that fails."""
    data = tensors(MODEL, dict.fromkeys(MODEL, "F32"))
    model = formats.Safetensors(aiouffd.map(data))
    model.prefetch_tensor_sync("w3")
    assert model["w3"].sum() == 3 * 77700

    class Broken:
        size = len(data)

        async def read(self, offset: int, length: int) -> bytes:
            if offset + length > 1 << 20:
                raise aiouffd.SourceError(repr(self), offset, length, "broken")
            return data[offset : offset + length]

    broken = formats.Safetensors(aiouffd.map(Broken()))
    with pytest.raises(aiouffd.SourceError, match="broken"):
        broken.prefetch_tensor_sync("w63")
    broken.prefetch_tensor_sync("w0")
    assert broken["w0"].sum() == 0


def test_without_a_block() -> None:
    """As with `aiouffd.map`; what could not be had is raised, and nothing is poisoned."""
    play(mapped)


async def on_the_loop() -> None:
    """Scenario: what would wait for its own loop."""
    async with aiouffd.open(npy(np.arange(9)), engine=aiouffd.InProcess()) as region:
        with pytest.raises(RuntimeError, match="await"):
            formats.Npy(region)
        file = await asyncio.to_thread(formats.Npy, region)
        with pytest.raises(RuntimeError, match="await"):
            file.prefetch_tensor_sync("array")
        await file.prefetch_tensor("array")
        assert file.array.sum() == 36


def test_in_the_thread_of_the_loop() -> None:
    """It is an error in place of a hang."""
    play(on_the_loop)
