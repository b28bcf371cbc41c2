"""Goes through the chunks of a whole snapshot, in threads: verify, extract, compare."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Unpack

from aiouffd.errors import SourceError, StoreError
from aiouffd.kernel import files
from aiouffd.ranges import Range, batched
from aiouffd.store.aside import aside
from aiouffd.store.chunks import blamed, expanded, runs_of, span
from aiouffd.store.codecs import digest
from aiouffd.store.folder import Folder
from aiouffd.store.layer import in_order
from aiouffd.store.place import SUFFIX
from aiouffd.store.snapshot import open_snapshot, read_linked, trace_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.sources.storage_options import StorageOptions
    from aiouffd.store.aside import Progress, StoreOptions
    from aiouffd.store.index import Record
    from aiouffd.store.snapshot import Snapshot

__all__ = ["diff", "diff_sync", "extract", "extract_sync", "read_chunks", "scan", "verify", "verify_sync"]

_TOGETHER = 4 << 20  # bytes of the image whose chunks are looked up together, so that neighbors are one request

Place = str | os.PathLike[str]


def scan(snapshot: Snapshot) -> Iterator[list[tuple[Record, Any]]]:
    """Yield the records of all chunks that are not zeros, with their bytes, or with the StoreError about them.

    They come in the order of the image, but for those of 4 MiB, which come in that of their packs.
    """

    def runs() -> Iterator[list[Record]]:
        for some in batched(snapshot.index.find_all(), max(_TOGETHER // snapshot.index.chunk_size, 1)):
            yield from runs_of(some)

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads, "aiouffd-store") as pool:
        yield from in_order(pool, partial(_fetch, snapshot), runs(), 4 * threads)


def _fetch(snapshot: Snapshot, run: list[Record]) -> list[tuple[Record, Any]]:
    """Return the records of a run with their bytes, or with the StoreError about them."""
    index, store = snapshot.index, snapshot.store
    path = index.path(run[0])
    name = store.name(path)
    start, stop = span(run)
    try:
        data = memoryview(store.read(path, start, stop))
    except SourceError as error:
        return [(record, blamed(index, record, name, error.reason)) for record in run]
    frames = ((record, record.offset - start) for record in run)
    return [(record, expanded(index, record, data[at : at + record.length], name)) for record, at in frames]


def _bytes(outcome: Any) -> Any:
    """Return the bytes of a chunk; raise what is in place of them."""
    if isinstance(outcome, StoreError):
        raise outcome
    return outcome


def _report(snapshot: Snapshot, some: list[tuple[Record, Any]], progress: Progress | None) -> None:
    if progress is not None:
        index = snapshot.index
        done = 1 + max(record.chunk for record, _ in some)
        progress(min(done * index.chunk_size, index.size), index.size)


async def verify(place: Place, **options: Unpack[StoreOptions]) -> list[StoreError]:
    """As `verify_sync`, in threads. Canceling is safe."""
    return await aside(verify_sync, place, **options)


def verify_sync(
    place: Place, *, storage_options: StorageOptions | None = None, progress: Progress | None = None
) -> list[StoreError]:
    """Read a whole snapshot, and compare each chunk with its hash.

    Args:
        place: path or URL of its manifest.
        storage_options: as for `open`.
        progress: called with the bytes that are done and all bytes. What it raises ends this.

    Returns:
        what is damaged or missing; nothing, if all is well.

    Raises:
        StoreError: its manifest or index cannot be read at all.
    """
    snapshot = open_snapshot(place, storage_options)
    found: list[StoreError] = []
    trace = snapshot.manifest.trace
    if trace is not None:
        try:
            read_linked(snapshot.store, trace_path(trace), trace)
        except StoreError as error:
            found.append(error)
    for some in scan(snapshot):
        found += filter(None, (_wrong(snapshot, record, outcome) for record, outcome in some))
        _report(snapshot, some, progress)
    return found


def _wrong(snapshot: Snapshot, record: Record, outcome: Any) -> StoreError | None:
    """Return what is wrong with a chunk: the outcome, if that is an error, or its hash."""
    if isinstance(outcome, StoreError):
        return outcome
    name = snapshot.store.name(snapshot.index.path(record))
    reason = "it was written with the hash of other bytes"
    return None if digest(outcome) == record.hash else blamed(snapshot.index, record, name, reason)


async def extract(place: Place, destination: Place, **options: Unpack[StoreOptions]) -> None:
    """As `extract_sync`, in threads. Canceling is safe: no file appears."""
    await aside(extract_sync, place, destination, **options)


def extract_sync(
    place: Place,
    destination: Place,
    *,
    storage_options: StorageOptions | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the image of a snapshot to a local file. Zeros become holes. The file appears when it is whole.

    Args:
        place: path or URL of the manifest.
        destination: path of the file, which is replaced if it is there.
        storage_options: as for `open`.
        progress: called with the bytes that are done and all bytes. What it raises ends this.

    Raises:
        StoreError: the snapshot is damaged, or the file cannot be written.
    """
    snapshot = open_snapshot(place, storage_options)
    index = snapshot.index
    above, name = os.path.split(os.path.abspath(destination))  # noqa: PTH100 - resolve() would follow links
    if name.endswith(SUFFIX):
        raise StoreError(str(destination), 0, 0, "an image must not have the name of a snapshot")

    def fill(fd: int) -> None:
        os.ftruncate(fd, index.size)
        for some in scan(snapshot):
            for record, outcome in some:
                files.write_at(fd, _bytes(outcome), index.start_of(record.chunk))
            _report(snapshot, some, progress)

    Folder(above).fill(name, fill)


async def diff(one: Place, other: Place, **options: Unpack[StoreOptions]) -> list[Range]:
    """As `diff_sync`, in threads. Canceling is safe."""
    return await aside(diff_sync, one, other, **options)


def diff_sync(
    one: Place,
    other: Place,
    *,
    storage_options: StorageOptions | None = None,
    progress: Progress | None = None,
) -> list[Range]:
    """Return where the images of two snapshots differ, in whole chunks.

    Where their chunks have the same size, only their hashes are compared. What one image has behind the end of the
    other is different.

    Raises:
        StoreError: one of them is damaged.
    """
    pair = open_snapshot(one, storage_options), open_snapshot(other, storage_options)
    unit = max(snapshot.index.chunk_size for snapshot in pair)
    size = max(snapshot.index.size for snapshot in pair)
    hashes = [_hashes(snapshot, unit, -(-size // unit)) for snapshot in pair]
    found: list[Range] = []
    for number, (left, right) in enumerate(zip(*hashes, strict=True)):
        if left != right:
            start, stop = number * unit, min((number + 1) * unit, size)
            if found and found[-1].end == start:
                start = found.pop().start
            found.append(Range(start, stop - start))
        if progress is not None:
            progress(min((number + 1) * unit, size), size)
    return found


def _hashes(snapshot: Snapshot, unit: int, count: int) -> Iterator[bytes | None]:
    """Yield the hashes of the image in units, `count` of them; None for one behind its end."""
    index = snapshot.index
    for number in range(count):
        start, stop = number * unit, min((number + 1) * unit, index.size)
        if start >= stop:
            yield None
        elif index.chunk_size == unit:
            record = index.find(number)
            yield _zeros(stop - start) if record is None else record.hash
        else:
            yield digest(read_chunks(snapshot, start, stop))


def read_chunks(snapshot: Snapshot, start: int, stop: int) -> bytearray:
    """Return bytes of an image; blocks; `start` is the beginning of a chunk, and `stop` the end of one.

    Raises:
        StoreError: a chunk is damaged or missing.
    """
    index = snapshot.index
    data = bytearray(stop - start)
    low, high = start // index.chunk_size, -(-stop // index.chunk_size)
    for run in runs_of(index.find_all(low, high)):
        for record, outcome in _fetch(snapshot, run):
            at = record.chunk * index.chunk_size - start
            data[at : at + index.length_of(record.chunk)] = _bytes(outcome)
    return data


@cache
def _zeros(length: int) -> bytes:
    return digest(bytes(length))
