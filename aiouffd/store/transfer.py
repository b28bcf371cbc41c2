"""Snapshots that are made from others: a copy in another store, and one without layers."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Unpack

from aiouffd.errors import StoreError
from aiouffd.store.aside import StoreOptions, aside
from aiouffd.store.codecs import LEVEL
from aiouffd.store.collect import unnamed_since
from aiouffd.store.layer import in_order
from aiouffd.store.pack import is_whole
from aiouffd.store.snapshot import index_path, open_snapshot, read_linked, trace_path
from aiouffd.store.writer import create_sync, publish, target

if TYPE_CHECKING:
    from aiouffd.sources.storage_options import StorageOptions
    from aiouffd.store.aside import Progress
    from aiouffd.store.bucket import Bucket
    from aiouffd.store.folder import Folder
    from aiouffd.store.index import PackName
    from aiouffd.store.manifest import Manifest

__all__ = ["CopyOptions", "FlattenOptions", "copy", "copy_sync", "flatten", "flatten_sync"]

_AT_ONCE = 4  # packs in memory

Place = str | os.PathLike[str]


class CopyOptions(StoreOptions, total=False):
    """The options of `copy_sync`."""

    replace: bool


class FlattenOptions(CopyOptions, total=False):
    """The options of `flatten_sync`."""

    codec: str | None
    level: int
    chunk_size: int | None


async def copy(source: Place, destination: Place, **options: Unpack[CopyOptions]) -> Manifest:
    """As `copy_sync`, in threads. Canceling is safe: no manifest appears; what was copied is there the next time."""
    return await aside(copy_sync, source, destination, **options)


def copy_sync(
    source: Place,
    destination: Place,
    *,
    replace: bool = False,
    storage_options: StorageOptions | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Copy a snapshot to another store, or to another name. Packs that are there already are not copied.

    But for those that `gc_sync` has seen to be needed by no snapshot: it may be about to remove them.

    Whole packs are copied, also those of its bases of which it needs little: `flatten_sync` writes only what it needs.

    Args:
        source: path or URL of the manifest.
        destination: of the new one.
        replace: whether a snapshot of that name may be replaced.
        storage_options: for both stores, as for `open`.
        progress: called with the bytes that are done and all bytes. What it raises ends the copying.

    Raises:
        StoreError: the snapshot is damaged, or the new one cannot be written, or is there already.
    """
    snapshot = open_snapshot(source, storage_options)
    store, name = target(destination, storage_options, replace=replace)
    manifest = snapshot.manifest
    packs = [snapshot.index.pack(number) for number in range(snapshot.index.packs)]
    whole, unnamed = sum(pack.length for pack in packs), unnamed_since(store)
    done = 0

    def copied(pack: PackName) -> PackName:
        if pack.path in unnamed or store.size(pack.path) != pack.length:
            _copy_pack(snapshot.store, store, pack)
        return pack

    with ThreadPoolExecutor(_AT_ONCE, "aiouffd-store-copy") as pool:
        for pack in in_order(pool, copied, packs, _AT_ONCE):
            done += pack.length
            if progress is not None:
                progress(done, whole)
    for path, link in ((index_path(manifest.index), manifest.index), *_trace(manifest)):
        store.put(path, [read_linked(snapshot.store, path, link)])
    publish(store, name, manifest, replace=replace)
    return manifest


def _trace(manifest: Manifest) -> list[tuple[str, Any]]:
    return [] if manifest.trace is None else [(trace_path(manifest.trace), manifest.trace)]


def _copy_pack(source: Folder | Bucket, destination: Folder | Bucket, pack: PackName) -> None:
    """Copy a pack; check it."""
    data = source.read(pack.path, 0, pack.length)
    if len(data) != pack.length or not is_whole(data, pack.digest):
        raise StoreError(source.name(pack.path), 0, 0, "it is damaged: its hash is another than its name says")
    destination.put(pack.path, [data])


async def flatten(source: Place, destination: Place, **options: Unpack[FlattenOptions]) -> Manifest:
    """As `flatten_sync`, in threads. Canceling is safe, as for `create`."""
    return await aside(flatten_sync, source, destination, **options)


def flatten_sync(
    source: Place,
    destination: Place,
    *,
    codec: str | None = None,
    level: int = LEVEL,
    chunk_size: int | None = None,
    replace: bool = False,
    storage_options: StorageOptions | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a snapshot anew, into packs that hold nothing else: what is adjacent in the image is adjacent there.

    Args:
        source: path or URL of the manifest.
        destination: of the new one, in any store.
        codec: as for `create_sync`; by default that of the source.
        level: as for `create_sync`.
        chunk_size: as for `create_sync`; by default that of the source.
        replace: whether a snapshot of that name may be replaced.
        storage_options: for both stores, as for `open`.
        progress: as for `create_sync`.

    Raises:
        StoreError: the snapshot is damaged, or the new one cannot be written, or is there already.
    """
    snapshot = open_snapshot(source, storage_options)
    manifest = snapshot.manifest
    with tempfile.NamedTemporaryFile() as recording:
        for path, link in _trace(manifest):
            recording.write(read_linked(snapshot.store, path, link))
            recording.flush()
        return create_sync(
            source,
            destination,
            codec=codec or manifest.codec,
            level=level,
            chunk_size=chunk_size or manifest.chunk_size,
            page_size=manifest.page_size,
            trace=recording.name if manifest.trace is not None else None,
            metadata=manifest.metadata,
            replace=replace,
            storage_options=storage_options,
            progress=progress,
        )
