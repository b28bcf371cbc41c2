"""`pager.process.serialization`: sources of ours as plain values, those of others as pickles."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import socket
from array import array
from typing import TYPE_CHECKING, Any

import pytest

from aiouffd import errors
from aiouffd.criu.relay import RelaySource
from aiouffd.engine.ahead.trace import Recorder, Trace
from aiouffd.engine.options import Service
from aiouffd.pager.process.serialization import is_pickle, modules, pack, unpack
from aiouffd.sources.base import Descriptor, ZeroSource
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.concat import ConcatSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.layered import LayeredSource
from aiouffd.sources.object_store import ObjectSource
from aiouffd.store.cache import ChunkCache
from aiouffd.store.cached_source import CachedSource

if TYPE_CHECKING:
    from pathlib import Path


class WithFile:
    """A source that holds a descriptor."""

    def __init__(self, descriptor: Descriptor) -> None:
        self.descriptor = descriptor

    def travel(self) -> tuple[Any, tuple[Any, ...]]:
        """Take the descriptor along."""
        return WithFile, (self.descriptor,)


def test_descriptors_travel_beside_the_pickle() -> None:
    """An object with `travel()` is rebuilt around the receiver's descriptor."""
    fd = os.memfd_create("x")
    data, descriptors = pack([WithFile(Descriptor(fd))])
    assert [item.fd for item in descriptors] == [fd]
    (again,) = unpack(data, [os.dup(fd)])
    assert os.fstat(again.descriptor.fd).st_ino == os.fstat(fd).st_ino
    os.close(again.descriptor.detach())
    os.close(fd)


def test_closures_travel_by_value() -> None:
    """A function of a function, which pickle itself refuses, arrives."""
    number = 41

    def add() -> int:
        return number + 1

    data, _ = pack(add)
    assert pickle.loads(data)() == 42  # what cloudpickle writes, pickle reads


def test_what_cannot_travel_is_a_typed_error_that_names_the_ways_out() -> None:
    """A socket cannot be pickled: PagerStartError says what to do."""
    with socket.socket() as thing, pytest.raises(errors.PagerStartError, match=r"InThread\(\).*InProcess\(\)"):
        pack(thing)


def there_and_back(thing: Any) -> Any:
    """Return what a pager would rebuild; nothing was pickled."""
    data, descriptors = pack(thing)
    assert not is_pickle(data)
    return unpack(data, [os.dup(item.fd) for item in descriptors])


async def test_our_own_sources_travel_without_a_pickle(tmp_path: Path) -> None:
    """Alone, and within each other; the bytes are the same there."""
    path = tmp_path / "file"
    await asyncio.to_thread(path.write_bytes, b"file" * 1000)
    url = ObjectSource(
        "https://host/key?signed=1", timeout=7.0, retry_config={"max_retries": 3}, client_options={"allow_http": True}
    )
    for source in (ZeroSource(5000), BufferSource(b"buffer" * 1000), FileSource(path), url):
        again = await asyncio.to_thread(there_and_back, source)
        assert type(again) is type(source)
        if source is not url:
            assert again.size == source.size
            assert bytes(await again.read(17, 100)) == bytes(await source.read(17, 100))
    again = await asyncio.to_thread(there_and_back, url)
    assert again.__reduce__() == url.__reduce__()
    both = await asyncio.to_thread(there_and_back, ConcatSource([FileSource(path), BufferSource(b"behind")]))
    assert bytes(await both.read(0, 4)) == b"file"
    assert bytes(await both.read(both.starts[1], 6)) == b"behind"
    layered = await asyncio.to_thread(there_and_back, LayeredSource([BufferSource(b"below" * 800), path]))
    assert bytes(await layered.read(0, 4)) == b"file"
    cached = there_and_back(CachedSource(url, ChunkCache("/cache", 8 << 20)))
    assert cached.source.__reduce__() == url.__reduce__()
    assert (cached.cache.path, cached.cache.max_bytes) == ("/cache", 8 << 20)
    relay = there_and_back(RelaySource(b"\0name", 3, 4096))
    assert (relay.address, relay.index, relay.size) == (b"\0name", 3, 4096)


def test_a_service_travels_with_its_recorder_and_its_trace(tmp_path: Path) -> None:
    """The descriptor of the recording goes along; what is to be replayed arrives as it was."""
    recorder = Recorder.create(tmp_path / "trace", 4096, 1 << 20)
    trace = Trace(4096, 1 << 20, array("Q", [0, 8192, 4096]))
    again = there_and_back(Service(ZeroSource(1 << 20), recorder, trace))
    assert again.trace == trace
    assert os.fstat(again.recorder.fileno()).st_ino == os.fstat(recorder.fileno()).st_ino
    again.recorder.close()
    recorder.discard()


def test_the_modules_that_rebuilding_imports_are_known(tmp_path: Path) -> None:
    """Of parts, too. Of a pickle only that it is one."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    both = Service(ConcatSource([FileSource(path), BufferSource(b"behind")]))
    sources = {f"aiouffd.sources.{name}" for name in ("concat", "file", "buffer")}
    assert modules(pack(both)[0]) == sources | {"aiouffd.engine.options"}
    assert modules(pack(Service(Mine(b"x")))[0]) == {"cloudpickle"}
    assert modules(b'{"os:system": ["true"]}') == set()


class Mine(BufferSource):
    """A source of the application's own, though it inherits from one of ours."""


@pytest.mark.parametrize(
    "thing",
    [Service(Mine(b"x")), Service(ConcatSource([Mine(b"x")])), ObjectSource("https://h/k", credential_provider=object)],
)
def test_what_is_not_ours_is_pickled(thing: Any) -> None:
    """Whether it is the source itself, a part of one, or an option."""
    assert is_pickle(pack(thing)[0])


@pytest.mark.parametrize(
    "value",
    [
        {"os:system": ["true"]},
        {"aiouffd.sources.base:Descriptor": [0]},
        {"aiouffd.pager.process.serialization:pickle.loads": [{"bytes": ""}]},
        {"aiouffd.sources.file:os.system": ["true"]},
        {"list": [{"builtins:eval": ["1"]}]},
        {"aiouffd.sources.base:ZeroSource": [1], "fd": 0},
        {},
    ],
)
def test_nothing_else_is_rebuilt_from_plain_values(value: Any) -> None:
    """Only what is listed is called, whatever is sent."""
    with pytest.raises(ValueError, match=r"arrive|unpack"):
        unpack(json.dumps(value).encode(), [])
