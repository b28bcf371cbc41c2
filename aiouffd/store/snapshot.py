"""An opened snapshot: its manifest, its index, and the store that its packs are in."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING, Any

from aiouffd.errors import SourceError, StoreError
from aiouffd.kernel import files
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.sources.storage_options import check_options
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
    "read_encoded",
    "read_linked",
    "read_manifest",
    "room_for_it",
    "trace_path",
]

_PIECE = 4 << 20
_FIRST = 64 << 10  # bytes of a manifest that are asked for at once: most have less than a thousand
_WHOLE = 32  # bytes of the hash of an object
_DAMAGED = "it is damaged: its hash is another than its manifest says"


def open_store(
    place: str, options: Mapping[str, Any] | None = None, *, make: bool = False, timeout: float | None = None
) -> Folder | Bucket:
    """Return the store at a path or a URL; make: a folder that is not there is made; timeout: as for `Bucket`."""
    check_options(place, options)
    place = without_scheme(place)
    if "://" in place:
        from aiouffd.store.bucket import Bucket  # noqa: PLC0415 - the extra `http`

        return Bucket(place, options or {}, timeout)
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
        index: a descriptor of its index, which belongs to this object then.

    Raises:
        StoreError: the index is damaged.
    """

    def __init__(self, store: Folder | Bucket, name: str, manifest: Manifest, index: int) -> None:
        self.store = store
        self.name = name
        self.manifest = manifest
        self._held = OwnedDescriptor(index)
        self.index: Index = Index(_Copy(self._held, manifest.index.length), store.name(index_path(manifest.index)))
        for what in ("size", "chunk_size"):
            if getattr(self.index, what) != getattr(manifest, what):
                raise StoreError(store.name(name), 0, 0, f"it has another {what} than its index")

    @property
    def index_fd(self) -> int:
        """The descriptor of the index, which stays this object's."""
        return self._held.fileno()

    def __repr__(self) -> str:
        return f"Snapshot({self.store.name(self.name)!r})"


class _Copy:
    """The bytes of a file, read as they are needed. A mapping would fill up with pages, and be SIGBUS for a bad sector.

    Args:
        file: belongs to this object, too.
        length: in bytes.
    """

    def __init__(self, file: OwnedDescriptor, length: int) -> None:
        self._file = file
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice) -> bytes:
        start, stop, _ = where.indices(self._length)
        return os.pread(self._file.fileno(), stop - start, start)


def read_manifest(store: Folder | Bucket, name: str) -> Manifest:
    """Read a manifest; blocks.

    Raises:
        StoreError: it is missing, damaged, or of an unknown version.
    """
    return Manifest.decode(read_encoded(store, name), store.name(name))


def read_encoded(store: Folder | Bucket, name: str) -> bytes:
    """Read the bytes of a manifest; blocks. Raises StoreError: it is missing, or too large for one."""
    try:
        data = bytes(store.read(name, 0, _FIRST))
        if len(data) == _FIRST:
            data += bytes(store.read(name, _FIRST, LARGEST_MANIFEST + 1))
    except SourceError as error:
        if store.size(name) is not None:
            raise
        raise StoreError(store.name(name), 0, 0, "there is no such snapshot: it is missing") from error
    if len(data) > LARGEST_MANIFEST:
        raise StoreError(store.name(name), 0, 0, "it is too large for a manifest of a snapshot")
    return data


def open_snapshot(
    place: str | os.PathLike[str], options: Mapping[str, Any] | None = None, *, timeout: float | None = None
) -> Snapshot:
    """Open a snapshot: read its manifest and all of its index, and check them; blocks.

    The index is copied to an unlinked temporary file: what is mapped must not change, be cut, or be on a file system
    that stops answering.

    Raises:
        StoreError: it is missing, damaged, or of an unknown version, or there is no room for the copy.
    """
    above, name = split(place)
    return open_in(open_store(above, options, timeout=timeout), name)


def open_in(store: Folder | Bucket, name: str) -> Snapshot:
    """Open a snapshot of a store that is open; otherwise as `open_snapshot`."""
    manifest = read_manifest(store, name)
    return Snapshot(store, name, manifest, _copied_index(store, manifest.index))


def _copied_index(store: Folder | Bucket, link: Link) -> int:
    """Return a descriptor of a copy of an index whose length and hash are right."""
    path = index_path(link)

    def copied(fd: int) -> Iterator[bytes]:
        at = 0
        for piece in _pieces(store, path, link.length):
            with room_for_it(store.name(path)):
                files.write_at(fd, piece, at)
            at += len(piece)
            yield piece

    with room_for_it(store.name(path)):
        made = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed below
    with made as file:
        found = digest_of(copied(file.fileno()), _WHOLE).hex()
        fd = os.dup(file.fileno())
    if found != link.hash:
        os.close(fd)
        raise StoreError(store.name(path), 0, 0, _DAMAGED)
    return fd


@contextlib.contextmanager
def room_for_it(name: str) -> Iterator[None]:
    """A block that writes to a temporary file for an object of a store. Raises StoreError where that fails."""
    try:
        yield
    except OSError as error:
        reason = f"there is no room for a copy of it ({error.strerror}): TMPDIR names a folder for temporary files"
        raise StoreError(name, 0, 0, reason) from error


def _pieces(store: Folder | Bucket, path: str, length: int) -> Iterator[bytes]:
    """Yield the bytes of an object, which must have this length."""
    done = 0
    while done <= length:
        stop = min(done + _PIECE, length + 1)  # one more than there should be
        data = store.read(path, done, stop)
        done += len(data)
        yield data
        if done < stop:
            break
    if done != length:
        has = f"{done} bytes" if done < length else f"more than {length} bytes"
        raise StoreError(store.name(path), 0, 0, f"it has {has}, and its manifest says {length}")


def read_linked(store: Folder | Bucket, path: str, link: Link) -> bytes:
    """Return an object that a manifest names, whole and checked; blocks.

    Raises:
        StoreError: it is missing or damaged.
    """
    data = b"".join(_pieces(store, path, link.length))
    if digest_of([data], _WHOLE).hex() != link.hash:
        raise StoreError(store.name(path), 0, 0, _DAMAGED)
    return data
