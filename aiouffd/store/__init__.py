"""Snapshots: images of memory in compressed chunks and in layers, in a folder or an object store.

Layout:

- `manifest`, `index`, `pack`: the three kinds of objects, bytes in and values out. `codecs`: compression and hashes.
- `folder`, `bucket`: where objects are. `place`: what names a snapshot. `snapshot`: one that is opened.
- `snapshot_source`: what a Monitor serves it from. `chunks` fetches and keeps chunks in the threads of `workers`.
- `zstd_seekable`: a file of zstd as a source, chunk by chunk; `seek_table` says where its frames are.
- `filesystem`: fsspec's way to the cache.
- `resolve`: from a path, a URL or a buffer to a source.
- `writer`: writes a snapshot. `image` is what it reads, `layer` what it writes; `aside` runs it in a thread.
- `attaching`: keeps a recording with a snapshot that is there.
- `live`: a snapshot of memory in use.
- `cache`: chunks that are kept on the host; `segments`, `cache_index` and `key_locks` are its files, which
  `cache_files` opens and locks.
- `cached_source` serves from it: `fetches` brings chunks, `chunk_names` names them, `view` maps them.
- `scan`: verify, extract, diff. `transfer`: copy, flatten. `collect`: gc.

docs/reference/snapshot-format.md describes the format.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiouffd.store.attaching import attach, attach_sync
    from aiouffd.store.collect import gc, gc_sync
    from aiouffd.store.folder import Entry
    from aiouffd.store.live import Captured, LiveOptions
    from aiouffd.store.manifest import Manifest
    from aiouffd.store.scan import diff, diff_sync, extract, extract_sync, verify, verify_sync
    from aiouffd.store.snapshot import Snapshot, open_snapshot
    from aiouffd.store.snapshot_source import SnapshotSource
    from aiouffd.store.transfer import copy, copy_sync, flatten, flatten_sync
    from aiouffd.store.writer import create, create_sync

__all__ = [
    "Captured",
    "Entry",
    "LiveOptions",
    "Manifest",
    "Snapshot",
    "SnapshotSource",
    "attach",
    "attach_sync",
    "copy",
    "copy_sync",
    "create",
    "create_sync",
    "diff",
    "diff_sync",
    "extract",
    "extract_sync",
    "flatten",
    "flatten_sync",
    "gc",
    "gc_sync",
    "open_snapshot",
    "verify",
    "verify_sync",
]

_HOMES = {
    "collect": "gc gc_sync",
    "folder": "Entry",
    "live": "Captured LiveOptions",
    "manifest": "Manifest",
    "scan": "diff diff_sync extract extract_sync verify verify_sync",
    "snapshot": "Snapshot open_snapshot",
    "snapshot_source": "SnapshotSource",
    "transfer": "copy copy_sync flatten flatten_sync",
    "attaching": "attach attach_sync",
    "writer": "create create_sync",
}
_HOME_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import on first use: most programs have no snapshots."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
