"""An opened snapshot: its manifest, its index, and the store that its packs are in."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import TYPE_CHECKING, Any, BinaryIO

from aiouffd.errors import StoreError
from aiouffd.kernel.memory import map_file
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.store.codecs import digest_of
from aiouffd.store.folder import Folder
from aiouffd.store.index import Index
from aiouffd.store.manifest import LARGEST_MANIFEST, Link, Manifest
from aiouffd.store.place import split, without_scheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiouffd.store.bucket import Bucket

__all__ = [
    "Snapshot",
    "index_path",
    "open_in",
    "open_snapshot",
    "open_store",
    "read_linked",
    "read_manifest",
    "trace_path",
]

_PIECE = 4 << 20
_WHOLE = 32  # bytes of the hash of an object
_DAMAGED = "it is damaged: its hash is another than its manifest says"


def open_store(place: str, options: Mapping[str, Any] | None = None, *, make: bool = False) -> Folder | Bucket:
    """Return the store at a path or a URL; make: a folder that is not there is made."""
    place = without_scheme(place)
    if "://" in place:
        from aiouffd.store.bucket import Bucket  # noqa: PLC0415 - the extra `http`

        return Bucket(place, options or {})
    return Folder.make(place) if make else Folder(place)


def index_path(link: Link) -> str:
    """Return where an index is in its store."""
    return f"indexes/{link.hash}"


def trace_path(link: Link) -> str:
    """Return where a recording is in its store."""
    return f"traces/{link.hash}"


class Snapshot:
    """What is known of a snapshot without reading a chunk of it.

    Args:
        store: where it is.
        name: of its manifest.
        manifest: what it is.
        index: a descriptor of its index, which belongs to this object then. The index is mapped: what is not asked for
            takes no memory.

    Raises:
        StoreError: the index is damaged.
    """

    def __init__(self, store: Folder | Bucket, name: str, manifest: Manifest, index: int) -> None:
        self.store = store
        self.name = name
        self.manifest = manifest
        self._held = OwnedDescriptor(index)
        self._map = map_file(index, manifest.index.length, mmap.ACCESS_READ)
        self.index = Index(self._map, store.name(index_path(manifest.index)))
        for what in ("size", "chunk_size"):
            if getattr(self.index, what) != getattr(manifest, what):
                raise StoreError(store.name(name), 0, 0, f"it has another {what} than its index")

    @property
    def index_fd(self) -> int:
        """The descriptor of the index, which stays this object's."""
        return self._held.fileno()

    def __repr__(self) -> str:
        return f"Snapshot({self.store.name(self.name)!r})"


def read_manifest(store: Folder | Bucket, name: str) -> Manifest:
    """Read a manifest; blocks.

    Raises:
        StoreError: it is missing, damaged, or of an unknown version.
    """
    size = store.size(name)
    if size is None:
        raise StoreError(store.name(name), 0, 0, "there is no such snapshot: it is missing")
    if size > LARGEST_MANIFEST:
        raise StoreError(store.name(name), 0, 0, "it is too large for a manifest of a snapshot")
    return Manifest.decode(bytes(store.read(name, 0, size)), store.name(name))


def open_snapshot(place: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Snapshot:
    """Open a snapshot: read its manifest and all of its index, and check them; blocks.

    The index is copied to an unlinked temporary file: what is mapped must not change, be cut, or be on a file system
    that stops answering.

    Raises:
        StoreError: it is missing, damaged, or of an unknown version, or there is no room for the copy.
    """
    above, name = split(place)
    return open_in(open_store(above, options), name)


def open_in(store: Folder | Bucket, name: str) -> Snapshot:
    """Open a snapshot of a store that is open; otherwise as `open_snapshot`."""
    manifest = read_manifest(store, name)
    return Snapshot(store, name, manifest, _copied_index(store, manifest.index))


def _copied_index(store: Folder | Bucket, link: Link) -> int:
    """Return a descriptor of a copy of an index whose length and hash are right."""
    path = index_path(link)
    try:
        with tempfile.TemporaryFile(buffering=0) as file:
            found = digest_of(_copied(store, path, link.length, file), _WHOLE).hex()
            fd = os.dup(file.fileno())
    except OSError as error:
        reason = f"there is no room for a copy of it ({error.strerror}): TMPDIR names a folder for temporary files"
        raise StoreError(store.name(path), 0, 0, reason) from error
    if found != link.hash:
        os.close(fd)
        raise StoreError(store.name(path), 0, 0, _DAMAGED)
    return fd


def _copied(store: Folder | Bucket, path: str, length: int, file: BinaryIO) -> Iterator[bytes]:
    """Copy an object, and yield its bytes."""
    _check_size(store, path, length)
    for at in range(0, length, _PIECE):
        data = store.read(path, at, min(at + _PIECE, length))
        file.write(data)
        yield data


def _check_size(store: Folder | Bucket, path: str, length: int) -> None:
    size = store.size(path)
    if size != length:
        reason = "it is missing" if size is None else f"it has {size} bytes, and its manifest says {length}"
        raise StoreError(store.name(path), 0, 0, reason)


def read_linked(store: Folder | Bucket, path: str, link: Link) -> bytes:
    """Return an object that a manifest names, whole and checked; blocks.

    Raises:
        StoreError: it is missing or damaged.
    """
    _check_size(store, path, link.length)
    data = bytes(store.read(path, 0, link.length))
    if digest_of([data], _WHOLE).hex() != link.hash:
        raise StoreError(store.name(path), 0, 0, _DAMAGED)
    return data
