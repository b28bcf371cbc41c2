"""Keeps a recording of first touches with a snapshot that is there."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypedDict, Unpack

import attrs

from aiouffd.engine.ahead.merging import merged
from aiouffd.engine.ahead.trace import Trace, differ, fingerprint
from aiouffd.errors import TraceError
from aiouffd.store.aside import aside
from aiouffd.store.manifest import Manifest
from aiouffd.store.place import split
from aiouffd.store.snapshot import open_store, read_encoded, read_linked, trace_path
from aiouffd.store.snapshot_source import validator_of
from aiouffd.store.writer import publish, put_trace

if TYPE_CHECKING:
    from aiouffd.engine.ahead.merging import Order
    from aiouffd.sources.storage_options import StorageOptions
    from aiouffd.store.aside import Progress
    from aiouffd.store.bucket import Bucket
    from aiouffd.store.folder import Folder

__all__ = ["AttachOptions", "attach", "attach_sync"]

Place = str | os.PathLike[str]


class AttachOptions(TypedDict, total=False):
    """The options of `attach_sync`."""

    by: Order | None
    most: int | None
    storage_options: StorageOptions | None
    progress: Progress | None


async def attach(place: Place, trace: Place, **options: Unpack[AttachOptions]) -> Manifest:
    """As `attach_sync`, in a thread. Canceling is safe: the manifest is the old one, or the new one."""
    return await aside(attach_sync, place, trace, **options)


def attach_sync(
    place: Place,
    trace: Place,
    *,
    by: Order | None = "union",
    most: int | None = None,
    storage_options: StorageOptions | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Keep a recording of first touches with a snapshot, which is replayed when the snapshot is opened from now on.

    Only the manifest is written anew, at once or not at all. Who has opened the snapshot goes on as before.

    Args:
        place: of the manifest, a path or a URL.
        trace: the path of a recording (`record=`, `aiouffd ctl record`). Bytes of pages that it carries are left out:
            the snapshot has them.
        by: how it is merged with the recording that the snapshot has, the older one: see `aiouffd trace merge`. None:
            it takes the place of that.
        most: bytes of pages, at most; the last ones are left out. None: no bound.
        storage_options: as for `open`.
        progress: called once, before the manifest is written. What it raises ends the work.

    Raises:
        TraceError: it is no recording, or of another source than the snapshot.
        StoreError: the snapshot is missing or damaged, has changed meanwhile, or cannot be written to.
        OSError: the recording cannot be read.
    """
    above, name = split(place)
    store = open_store(above, storage_options)
    before = read_encoded(store, name)
    manifest = Manifest.decode(before, store.name(name))
    found = Trace.load(trace)
    of_snapshot = fingerprint(SimpleNamespace(size=manifest.size, validator=validator_of(manifest)))
    if found.size != manifest.size or differ(found.source, of_snapshot):
        raise TraceError(str(trace), f"it was recorded from another source than {store.name(name)}")
    named = [(str(trace), found)]
    if by is not None and manifest.trace is not None:
        named.insert(0, (store.name(name), _kept(store, name, manifest)))
    made = merged(named, by or "last", most=most)
    if not made.offsets:
        raise TraceError(str(trace), "it has no page that could be kept")
    fresh = attrs.evolve(manifest, trace=put_trace(store, made.encode()))
    if progress is not None:
        progress(0, 1)
    publish(store, name, fresh, replace=True, instead_of=before)
    return fresh


def _kept(store: Folder | Bucket, name: str, manifest: Manifest) -> Trace:
    assert manifest.trace is not None
    return Trace.parse(read_linked(store, trace_path(manifest.trace), manifest.trace), store.name(name))
