"""Writes a snapshot."""

from __future__ import annotations

import contextlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypedDict, Unpack

from aiouffd.engine.ahead.trace import Trace
from aiouffd.errors import StoreError, TraceError, refuse_unknown
from aiouffd.store.aside import aside
from aiouffd.store.codecs import LEVEL, digest, digest_of
from aiouffd.store.image import Changed, open_diff, open_image
from aiouffd.store.layer import Layer, in_order
from aiouffd.store.manifest import LARGEST_MANIFEST, Link, Manifest, checked_chunk_size
from aiouffd.store.place import split
from aiouffd.store.snapshot import Snapshot, open_snapshot, open_store, trace_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from aiouffd.ranges import Range
    from aiouffd.sources.storage_options import StorageOptions
    from aiouffd.store.aside import Progress
    from aiouffd.store.bucket import Bucket
    from aiouffd.store.folder import Folder
    from aiouffd.store.image import Image
    from aiouffd.store.index import Index, Record

__all__ = ["CHUNK_SIZE", "CreateOptions", "create", "create_sync", "publish", "target", "threads", "write_image"]

CHUNK_SIZE: Final = 64 << 10
_SEGMENT: Final = 2 << 20  # bytes that a thread reads and hashes in one go: what `Rooms` lends


class _Seen(NamedTuple):
    """A chunk of the image that is not zeros: `record` says where the base has it, or `data` is its bytes."""

    chunk: int
    hash: bytes
    record: Record | None
    data: Any


class CreateOptions(TypedDict, total=False):
    """How a snapshot is written.

    Attributes:
        base: the manifest of a snapshot in the same folder, or under the same prefix. Its chunks are not written again.
        diff: the source has what has changed since the base, and holes elsewhere: a Diff snapshot of Firecracker. Data
            that is zeros is zeros.
        changed: where the source may differ from the base; nothing else of it is read.
        codec: `zstd` (the default), `lz4` or `none`.
        level: of zstd; 3 by default.
        chunk_size: in bytes, a power of two from 64 KiB to 8 MiB; by default that of the base, or 64 KiB.
        page_size: of the memory that it is an image of.
        trace: a recording of first touches (`Monitor(record=...)`), which is kept with the snapshot.
        metadata: any JSON, which is kept with it.
        replace: whether a snapshot of that name may be replaced.
        storage_options: as for `open`.
        progress: called with the bytes that are done and all bytes. What it raises ends the writing.
    """

    base: str | os.PathLike[str] | None
    diff: bool
    changed: Iterable[Range] | None
    codec: str
    level: int
    chunk_size: int | None
    page_size: int
    trace: str | os.PathLike[str] | None
    metadata: Mapping[str, Any] | None
    replace: bool
    storage_options: StorageOptions | None
    progress: Progress | None


async def create(source: Any, destination: str | os.PathLike[str], **options: Unpack[CreateOptions]) -> Manifest:
    """As `create_sync`, in threads. Canceling is safe: no manifest appears; what was written is used the next time."""
    return await aside(create_sync, source, destination, **options)


def create_sync(source: Any, destination: str | os.PathLike[str], **options: Unpack[CreateOptions]) -> Manifest:
    """Write a snapshot. Chunks of zeros, and chunks that the base has, are not written.

    The manifest appears last, at once or not at all. What a writer that was killed has written, one that begins again
    takes over within twelve hours. Two writers at once do no harm.

    Args:
        source: a path, a URL, a buffer or a source, another snapshot, too; it must not change.
        destination: of the manifest, a path or a URL that ends with `.snap`. Folders that are not there are made.
        **options: see `CreateOptions`.

    Raises:
        SourceError: the source cannot be read, or has changed.
        StoreError: the snapshot cannot be written, or is there already.
        ValueError: an option cannot be.
        TypeError: there is no such option.
    """
    refuse_unknown("create()", options, CreateOptions.__optional_keys__)
    stored, replace = options.get("storage_options"), options.get("replace", False)
    store, name = target(destination, stored, replace=replace)
    if options.get("diff"):
        image, changed = open_diff(source, _base_of(options), stored)
        options = {**options, "changed": changed}
    else:
        image = open_image(source, stored)
    return write_image(store, name, image, **options)


def write_image(store: Folder | Bucket, name: str, image: Image, *, replace: bool = False, **options: Any) -> Manifest:
    """Write the snapshot of an image, which is closed; otherwise as `create_sync`. `base` may be an opened snapshot."""
    with contextlib.closing(image):  # raises if it has changed
        manifest = _written(store, name, image, **options)
    publish(store, name, manifest, replace=replace)
    return manifest


def _written(
    store: Folder | Bucket,
    name: str,
    image: Image,
    *,
    base: Snapshot | str | os.PathLike[str] | None = None,
    changed: Iterable[Range] | None = None,
    codec: str = "zstd",
    level: int = LEVEL,
    chunk_size: int | None = None,
    page_size: int = mmap.PAGESIZE,
    trace: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    storage_options: StorageOptions | None = None,
    progress: Progress | None = None,
    **_: Any,
) -> Manifest:
    """Write all of a snapshot but its manifest."""
    below = None if base is None else _base(store, base, chunk_size, storage_options)
    index = None if below is None else below.index
    chunk_size = checked_chunk_size(chunk_size or (CHUNK_SIZE if index is None else index.chunk_size))
    if not image.size:
        raise StoreError(store.name(name), 0, 0, "its source is empty")
    recording = _recording(trace, image.size)
    looked_at = _looked_at(image, below, changed)
    with (
        threads() as (pool, writing),
        Layer(store, image.size, chunk_size, codec, level, index, pool, writing) as layer,
    ):
        _fill(layer, looked_at, chunk_size, index, pool, progress, keeps=looked_at is not image)
        link = layer.finish()
    named = None if below is None else below.name
    kept = put_trace(store, recording)
    return Manifest(image.size, page_size, chunk_size, codec, link, named, kept, dict(metadata or {}))


def _base_of(options: CreateOptions) -> str | os.PathLike[str]:
    """Return the base that a diff must have."""
    base = options.get("base")
    if base is None or options.get("changed") is not None:
        raise ValueError("diff=True says what has changed since base=, and takes the place of changed=")
    return base


def _looked_at(image: Image, below: Snapshot | None, changed: Iterable[Range] | None) -> Image:
    """Return what has to be looked at of an image; what is in no extent of it is as in the snapshot below."""
    if changed is None:
        return image
    if below is None:
        raise ValueError("changed= says what has changed since a snapshot: base= names it")
    if below.index.size != image.size:
        reason = f"it has {below.index.size} bytes, and what has changed since then {image.size}"
        raise StoreError(below.store.name(below.name), 0, 0, reason)
    return Changed(image, changed)


def target(
    destination: str | os.PathLike[str], options: Mapping[str, Any] | None, *, replace: bool
) -> tuple[Folder | Bucket, str]:
    """Return where a snapshot will be: its store, which is made if need be, and its name; StoreError if it is there."""
    above, name = split(destination)
    store = open_store(above, options, make=True)
    if not replace and store.size(name) is not None:
        raise _exists(store, name)
    return store, name


@contextlib.contextmanager
def threads() -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """Threads that compute, and threads that wait for a store."""
    with (
        ThreadPoolExecutor(os.cpu_count(), "aiouffd-store") as pool,
        ThreadPoolExecutor(4, "aiouffd-store-put") as writing,
    ):
        yield pool, writing


def publish(
    store: Folder | Bucket, name: str, manifest: Manifest, *, replace: bool, instead_of: bytes | None = None
) -> None:
    """Let a snapshot appear, all of whose objects are there; instead_of: in place of this manifest, and of no other.

    Raises:
        StoreError: there is one of that name, which must not be replaced; it cannot be written.
        ValueError: the metadata is no JSON.
    """
    data = manifest.encode()
    if len(data) > LARGEST_MANIFEST:
        raise StoreError(store.name(name), 0, 0, "its manifest would be too large: keep its metadata elsewhere")
    Manifest.decode(data, store.name(name))  # what no reader would take is not written
    if not store.put(name, [data], replace=replace, instead_of=instead_of):
        if instead_of is not None:
            raise StoreError(store.name(name), 0, 0, "it was replaced or removed meanwhile: do that again")
        raise _exists(store, name)


def _exists(store: Folder | Bucket, name: str) -> StoreError:
    return StoreError(
        store.name(name), 0, 0, "there is a snapshot of that name already; replace=True (--replace) replaces it"
    )


def _base(
    store: Folder | Bucket,
    base: Snapshot | str | os.PathLike[str],
    chunk_size: int | None,
    options: Mapping[str, Any] | None,
) -> Snapshot:
    below = base if isinstance(base, Snapshot) else open_snapshot(base, options)
    name = below.store.name(below.name)
    if not store.is_same(below.store):
        raise StoreError(name, 0, 0, "a base must be in the store of its layer: copy it there first")
    if chunk_size not in (None, below.index.chunk_size):
        raise StoreError(name, 0, 0, f"a layer has the chunks of its base, which are of {below.index.chunk_size} bytes")
    return below


def _fill(
    layer: Layer,
    image: Image,
    chunk_size: int,
    base: Index | None,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
    *,
    keeps: bool,
) -> None:
    """Give all chunks of an image to a layer; keeps: those of the base that are in no extent of the image, as well."""
    zeros = {length: digest(bytes(length)) for length in {chunk_size, image.size % chunk_size}}

    def look(segment: tuple[int, int]) -> tuple[int, int, list[_Seen]]:
        """Read and hash chunks; those of zeros are left out."""
        start, stop = segment
        data = memoryview(image.read(start, stop - start)).cast("B")
        seen = []
        below = {}
        if base is not None:
            numbers = start // chunk_size, min(-(-stop // chunk_size), base.chunks)
            below = {record.chunk: record for record in base.find_all(*numbers)}
        for at in range(start, stop, chunk_size):
            piece = data[at - start : at - start + chunk_size]
            found = digest(piece)
            if found != zeros[len(piece)]:
                number = at // chunk_size
                record = below.get(number)
                if record is not None and record.hash != found:
                    record = None
                seen.append(_Seen(number, found, record, b"" if record is not None else piece))
        if 2 * sum(len(item.data) for item in seen) < len(data):  # a view keeps all of what was read
            seen = [item._replace(data=bytes(item.data)) for item in seen]
        return start, stop, seen

    def keep(low: int, high: int) -> None:
        if keeps and base is not None:
            for record in base.find_all(low, high):
                layer.keep(record)

    next_chunk = 0
    for start, stop, seen in in_order(pool, look, _segments(image, chunk_size), 4 * (os.cpu_count() or 1)):
        keep(next_chunk, start // chunk_size)
        next_chunk = -(-stop // chunk_size)
        for item in seen:
            if item.record is not None:
                layer.keep(item.record)
            else:
                layer.add(item.chunk, item.hash, item.data)
        if progress is not None:
            progress(stop, image.size)
    keep(next_chunk, -(-image.size // chunk_size))


def _segments(image: Image, chunk_size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of what has data, in whole chunks, each chunk once."""
    step = max(_SEGMENT, chunk_size)
    done = 0
    for low, high in image.extents():
        start = max(low // chunk_size * chunk_size, done)
        done = max(done, min(-(-high // chunk_size) * chunk_size, image.size))
        for at in range(start, done, step):
            yield at, min(at + step, done)


def _recording(trace: str | os.PathLike[str] | None, size: int) -> bytes | None:
    """Return the bytes of a recording; raise TraceError if it is none, or of an image of another size."""
    if trace is None:
        return None
    loaded = Trace.load(trace)
    if loaded.size != size:
        raise TraceError(str(trace), "it was recorded from another source: its size is another")
    return loaded.encode()  # without bytes of pages, which the snapshot has itself


def put_trace(store: Folder | Bucket, recording: bytes | None) -> Link | None:
    """Write a recording; return what names it. Raises StoreError."""
    if recording is None:
        return None
    link = Link(digest_of([recording], 32).hex(), len(recording))
    store.put(trace_path(link), [recording])
    return link
