"""Removes objects that no snapshot of a store needs any more.

Who opens a snapshot goes on reading its packs when its manifest has been removed, and a writer names packs before its
manifest is there. So an object is removed only when it has been unnamed for a grace period. When it was first seen so
is kept in an object of the store, for the next time.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Final, Unpack

from aiouffd.store.aside import StoreOptions, aside
from aiouffd.store.folder import unwritten
from aiouffd.store.place import SUFFIX
from aiouffd.store.snapshot import index_path, open_in, open_store, trace_path

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from aiouffd.sources.storage_options import StorageOptions
    from aiouffd.store.aside import Progress
    from aiouffd.store.bucket import Bucket
    from aiouffd.store.folder import Entry, Folder

__all__ = ["GRACE", "GcOptions", "gc", "gc_sync", "unnamed_since"]

GRACE: Final = 48 * 3600.0
_SEEN: Final = "unnamed.json"
_FOLDERS: Final = ("packs/", "indexes/", "traces/")


class GcOptions(StoreOptions, total=False):
    """The options of `gc_sync`."""

    grace: float
    dry_run: bool


async def gc(place: str | os.PathLike[str], **options: Unpack[GcOptions]) -> list[Entry]:
    """As `gc_sync`, in threads. Canceling is safe."""
    return await aside(gc_sync, place, **options)


def gc_sync(
    place: str | os.PathLike[str],
    *,
    grace: float = GRACE,
    dry_run: bool = False,
    storage_options: StorageOptions | None = None,
    progress: Progress | None = None,
) -> list[Entry]:
    """Remove the objects of a store that no manifest in it has named for a grace period.

    The first run only notes what is unnamed, unless `grace` is 0. Files that a writer has left when it was killed go as
    well.

    Args:
        place: path or URL of the store.
        grace: seconds. It must be longer than a writer takes, and than a reader keeps a snapshot open that is removed.
            With less than twelve hours nothing may be written meanwhile.
        dry_run: remove nothing, and note nothing.
        storage_options: as for `open`.
        progress: called with the number of manifests that were read, and of all.

    Returns:
        what was removed, or would be.

    Raises:
        StoreError: a manifest or an index cannot be read: nothing is removed then.
    """
    store = open_store(str(place), storage_options)
    entries = list(store.list(""))  # before the manifests are read: what appears meanwhile is not looked at
    manifests = [entry.path for entry in entries if entry.path.endswith(SUFFIX) and "/" not in entry.path]
    named: set[str] = set()
    for number, path in enumerate(manifests):
        named.update(_named(store, path))
        if progress is not None:
            progress(number + 1, len(manifests))
    unnamed = {entry.path: entry for entry in entries if _is_object(entry.path) and entry.path not in named}
    now = time.time()
    before = unnamed_since(store)
    since = {path: _since(entry, before.get(path), now) for path, entry in unnamed.items()}
    due = [entry for path, entry in unnamed.items() if now - since[path] >= grace]
    if dry_run:
        return due
    for entry in due:
        if store.find(entry.path) == entry:  # right before it is removed: what was written again meanwhile stays
            store.delete(entry.path)
            del since[entry.path]
    store.put(_SEEN, [json.dumps(since, indent=1).encode()])
    return due


def _is_object(path: str) -> bool:
    """Tell whether a file is an object of this store, or what a writer has left of one; a manifest is none."""
    return path.startswith(_FOLDERS) or ("/" not in path and unwritten(path))


def _named(store: Folder | Bucket, name: str) -> Iterator[str]:
    """Yield what a manifest names."""
    snapshot = open_in(store, name)
    yield index_path(snapshot.manifest.index)
    if snapshot.manifest.trace is not None:
        yield trace_path(snapshot.manifest.trace)
    for number in range(snapshot.index.packs):
        yield snapshot.index.pack(number).path


def unnamed_since(store: Folder | Bucket) -> dict[str, float]:
    """Return when objects were first seen to be unnamed. Who names one of them anew writes it again: it may go soon."""
    if (size := store.size(_SEEN)) is None:
        return {}
    try:
        found = json.loads(bytes(store.read(_SEEN, 0, size)))
        return {str(path): float(seconds) for path, seconds in found.items()}
    except (ValueError, TypeError, AttributeError):
        return {}  # damaged: the grace period begins again


def _since(entry: Entry, seen: float | None, now: float) -> float:
    """Return since when an object is known to be unnamed: it may have been written again since it was seen so."""
    return now if seen is None or seen > now or entry.modified > seen else seen
