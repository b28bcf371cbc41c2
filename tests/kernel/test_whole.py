"""`formats.load_file`: all arrays of a file, in memory that nobody serves any more."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_files import npz, tensors
from scenario import play

import aiouffd
from aiouffd import formats
from examples.page_server import PageServer

MODEL: dict[str, Any] = {f"w{n}": np.full((100, 777), n, np.float32) for n in range(64)}
FILE = tensors(MODEL, dict.fromkeys(MODEL, "F32"))


def is_right(found: dict[str, Any]) -> bool:
    """Tell whether these are the arrays of the model."""
    return list(found) == list(MODEL) and all(np.array_equal(found[name], array) for name, array in MODEL.items())


async def from_afar(folder: str) -> None:
    """Scenario: by HTTP, into memory that is used then as any other."""
    Path(folder, "file").write_bytes(FILE)
    server = PageServer(Path(folder))
    async with await server.serve("127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/file"
        before = set(threading.enumerate())
        found = await asyncio.to_thread(formats.load_file, url, framework="numpy")
        assert len(FILE) <= server.bytes_sent <= len(FILE) + mmap.PAGESIZE  # the first page comes with the size
        assert is_right(found)
        assert not [each for each in set(threading.enumerate()) - before if each.name.startswith("aiouffd-in-thread")]
        reading, writing = os.pipe()
        assert os.write(writing, found["w5"][0]) == 777 * 4  # a system call, of which InThread serves none
        assert os.read(reading, 777 * 4) == MODEL["w5"][0].tobytes()
        found["w5"][:] = 9
        kept, memory = found.pop("w5"), weakref.ref(found["w6"].base)
        del found
        gc.collect()
        assert kept.min() == kept.max() == 9
        assert memory() is not None
        del kept
        gc.collect()
        while memory() is not None:  # the thread that has loaded it knows its result a little longer
            await asyncio.sleep(0.01)
            gc.collect()


@pytest.mark.parametrize("native", ["1", "0"])
def test_each_byte_is_fetched_once(native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody serves the memory then, which goes with the last array; also where there is no native part."""
    monkeypatch.setenv("AIOUFFD_NATIVE", native)
    play(from_afar, str(tmp_path), fresh=True)


def others(folder: str) -> None:
    """Scenario: other formats and frameworks, and what is no such file."""
    Path(folder, "file.npz").write_bytes(npz(a=np.arange(5), b=np.eye(3)))
    found = formats.load_file(f"{folder}/file.npz", kind=formats.Npz, framework="numpy")
    assert found["a"].tolist() == [0, 1, 2, 3, 4]
    assert found["b"].trace() == 3.0
    with pytest.raises(aiouffd.FormatError, match=r"file\.npz.*safetensors"):
        formats.load_file(f"{folder}/file.npz")
    with pytest.raises(aiouffd.SourceError, match="none"):
        formats.load_file(f"{folder}/none")
    with pytest.raises(ValueError, match="jax"):
        formats.load_file(FILE, framework="jax")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"max_resident: .*aiouffd\.open"):
        formats.load_file(FILE, max_resident=1 << 20)  # type: ignore[call-arg]
    assert is_right(formats.load_file(FILE, framework="numpy", readahead=0, concurrent_reads=1))


def test_other_files(tmp_path: Path) -> None:
    """Each format by its reader; an error names the file, and leaves nothing behind."""
    play(others, str(tmp_path))
