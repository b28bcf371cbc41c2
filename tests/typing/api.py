"""What the types of the public names accept and refuse. Checked by mypy and by pyright in its strict mode, never run.

A line with `type: ignore[...]` is one that must be refused: both report an ignore that is not needed.
"""

from __future__ import annotations

import io
import os
import zipfile
from concurrent.futures import Future
from typing import Any, assert_type

import aiouffd
from aiouffd import store

region = aiouffd.Region(1 << 20)
source = aiouffd.ZeroSource(1 << 20)


class Computed(aiouffd.Handler):
    """A handler of one's own."""

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Fill the page with what its offset says."""
        batch.copy(fault.page, fault.offset.to_bytes(8, "little") * (fault.page.length // 8))

    async def fork(self, event: aiouffd.Fork) -> None:
        """See the child's descriptor."""
        assert_type(event.uffd, aiouffd.Userfaultfd)


# Each engine takes what it can do.
aiouffd.Monitor(region)
aiouffd.Monitor(region, source, readahead=0, timeout=None, background=1e6, fork="serve")
aiouffd.Monitor(region, Computed(), engine=aiouffd.Pager(stuck_limit=None))
aiouffd.Monitor(region, source, engine=aiouffd.InThread(stuck_warning=1.0), record="trace", on_exit="zeros")
aiouffd.Monitor(region, source, engine=aiouffd.InProcess(spin_us=0), fork="serve")
aiouffd.Monitor(region, engine=aiouffd.ServedBy("/run/uffd.sock", source="a"), on_exit="populate", track_writes=True)

# And refuses what it cannot.
aiouffd.Monitor(region, source, engine=aiouffd.InThread(), fork="serve")  # type: ignore[call-overload]
aiouffd.Monitor(region, source, engine=aiouffd.ServedBy("/run/uffd.sock"))  # type: ignore[call-overload]
aiouffd.Monitor(region, engine=aiouffd.ServedBy("/run/uffd.sock"), readahead=0)  # type: ignore[call-overload]
aiouffd.Monitor(region, engine=aiouffd.ServedBy("/run/uffd.sock"), replay="trace")  # type: ignore[call-overload]
aiouffd.Monitor(region, source, on_error="retry", background=True, progress=True)
aiouffd.Monitor(region, source, on_error=lambda error: "sigbus" if isinstance(error, aiouffd.SourceError) else "retry")
aiouffd.Monitor(region, on_error=lambda _: "ignore")  # type: ignore[arg-type, return-value]
aiouffd.Monitor(region, on_error="ignore")  # type: ignore[call-overload]
aiouffd.Monitor(region, engine=aiouffd.ServedBy("/run/uffd.sock"), on_error="retry")  # type: ignore[call-overload]
aiouffd.Monitor(region, on_exit="explode")  # type: ignore[call-overload]
aiouffd.Monitor(region, b"bytes")  # type: ignore[call-overload]
aiouffd.Monitor(b"bytes")  # type: ignore[call-overload]
aiouffd.Monitor(region, in_thread=True)  # type: ignore[call-overload]
aiouffd.InThread(spin_us=50)  # type: ignore[call-arg]
aiouffd.Pager(stuck_limit="never")  # type: ignore[arg-type]

aiouffd.open("https://host/x", engine=aiouffd.InThread(), storage_options={"region": "eu-west-1"}, readahead=0)
aiouffd.open(b"bytes", on_exit="zeros")
aiouffd.open("path", engine=aiouffd.ServedBy("/run/uffd.sock"))  # type: ignore[arg-type]
aiouffd.open("path", chunks=4)  # type: ignore[call-arg]
aiouffd.open(4)  # type: ignore[arg-type]

options: aiouffd.StorageOptions = {"access_key_id": "a", "client_options": {"timeout": "30s", "allow_http": True}}
aiouffd.open("s3://bucket/key", storage_options=options)
aiouffd.ObjectSource("s3://bucket/key", timeout=5.0, **options)
aiouffd.open("s3://bucket/key", storage_options={"regoin": "eu-west-1"})  # type: ignore[arg-type]
aiouffd.open("s3://bucket/key", storage_options={"client_options": {"tiemout": "30s"}})  # type: ignore[arg-type]
aiouffd.map("s3://bucket/key", storage_options={"region": 5})  # type: ignore[arg-type]
aiouffd.ObjectSource("s3://bucket/key", regoin="eu-west-1")  # type: ignore[call-arg]
aiouffd.SnapshotSource("y.snap", regoin="eu-west-1")  # type: ignore[call-arg]

assert_type(aiouffd.map("https://host/x", storage_options={"region": "eu-west-1"}, background=True), aiouffd.Region)
aiouffd.map(b"bytes", engine=aiouffd.InThread(), track_writes=True)
aiouffd.map("path", engine=aiouffd.InProcess())  # type: ignore[arg-type]
aiouffd.map("path", engine=aiouffd.ServedBy("/run/uffd.sock"))  # type: ignore[arg-type]
aiouffd.map("path", on_exit="zeros")  # type: ignore[call-arg]
aiouffd.map("path", readahead="2 MiB")  # type: ignore[arg-type]


def plain() -> None:
    """The plain forms."""
    with aiouffd.Monitor(region) as monitor:
        assert_type(monitor, aiouffd.Monitor)
        assert_type(monitor.prefetch_sync(0, 4096, timeout=1.0), None)
        assert_type(monitor.read(0, 10), bytes)
        assert_type(monitor.residency(), list[aiouffd.Range])
        assert_type(monitor.progress(), aiouffd.Progress)
        assert_type(monitor.progress().remaining, float | None)
        monitor.prefetch_sync(0, 4096, progress=True)
        monitor.prefetch_sync(0, 4096, progress=lambda now: print(now.resident))
        monitor.prefetch_sync(0, 4096, progress="bar")  # type: ignore[call-overload]
        monitor.prefetch_sync([aiouffd.Range(0, 4096)], timeout=1.0)
        assert_type(monitor.ask_for(monitor.residency()), Future[Any])
        monitor.prefetch_sync(0)  # type: ignore[call-overload]
        assert_type(monitor.collect(), list[aiouffd.Range])
        assert_type(monitor.statistics(), aiouffd.Statistics)
        assert_type(monitor.pids, tuple[int, ...])
    with aiouffd.open("path") as opened:
        assert_type(opened, aiouffd.Region)
        assert_type(opened.as_file(), io.BufferedReader)
        assert_type(opened.read(8), bytes)
        zipfile.ZipFile(opened)
    assert_type(len(aiouffd.open("path")), int)
    with aiouffd.map("path") as mapped:
        assert_type(mapped, aiouffd.Region)


async def asynchronous() -> None:
    """The forms for a program with a loop."""
    async with aiouffd.Monitor(region) as monitor:
        await monitor.prefetch(0, 4096)
        await monitor.prefetch(aiouffd.Range(4096 * page, 4096) for page in (1, 3))
        await monitor.wait_error()
    async with aiouffd.open("path") as opened:
        assert_type(opened, aiouffd.Region)


def kernel() -> None:
    """The kernel interface."""
    with aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE) as uffd:
        uffd.register(region.address, region.mapped_length, aiouffd.RegisterMode.MISSING)
        for event in uffd.read():
            match event:
                case aiouffd.PageFault():
                    assert_type(event.kind, aiouffd.FaultKind)
                case aiouffd.Fork(uffd=child):
                    assert_type(child, aiouffd.Userfaultfd)
                case aiouffd.Remove():
                    assert_type((event.start, event.end), tuple[int, int])
                case aiouffd.Remap() | aiouffd.Unmap() | aiouffd.UnknownEvent():
                    pass
    assert_type(aiouffd.probe(), aiouffd.Capabilities)
    assert_type(aiouffd.FileSource(os.fspath("x")), aiouffd.FileSource)
    assert_type(aiouffd.LayeredSource(["x", aiouffd.FileSource("y")]).size, int)
    assert_type(aiouffd.ChunkCache("x", 8 << 20).statistics(), dict[str, int])


async def snapshots() -> None:
    """Snapshots: functions, and their coroutines with the same options."""
    assert_type(store.create_sync("x", "y.snap", base="z.snap", chunk_size=65536), store.Manifest)
    assert_type(await store.create(b"x", "y.snap", changed=[aiouffd.Range(0, 1)]), store.Manifest)
    await store.create("x", "y.snap", chunks=5)  # type: ignore[call-arg]
    assert_type(await store.verify("y.snap", progress=print), list[aiouffd.StoreError])
    assert_type(await store.diff("y.snap", "z.snap", storage_options={}), list[aiouffd.Range])
    await store.extract("y.snap", "x", replace=True)  # type: ignore[call-arg]
    assert_type(await store.flatten("y.snap", "z.snap", codec="lz4", replace=True), store.Manifest)
    await store.verify("y.snap", storage_options={"regoin": "x"})  # type: ignore[arg-type]
    await store.gc("folder", grace=60, dry_run=True)
    assert_type(aiouffd.SnapshotSource("y.snap").size, int)
    assert_type(aiouffd.ZstdSeekableSource("y.zst", kept=1 << 20).size, int)
