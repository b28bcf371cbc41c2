"""The source of memory that shows a snapshot."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Unpack

from aiouffd.sources.base import Descriptor
from aiouffd.sources.storage_options import check_options
from aiouffd.sources.store_errors import hide_secrets
from aiouffd.store.chunks import Chunks
from aiouffd.store.codecs import prepare
from aiouffd.store.folder import Folder
from aiouffd.store.manifest import Manifest
from aiouffd.store.place import absolute, split
from aiouffd.store.snapshot import Snapshot, open_snapshot, open_store, read_linked, trace_path

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from aiouffd.sources.storage_options import StorageOptions

__all__ = ["SnapshotSource", "validator_of"]

_KEPT = 32 << 20


class SnapshotSource:
    """The image of a snapshot, as it is when it is opened.

    The frame of each chunk is checked against its hash before a byte of the chunk is shown.

    Args:
        url: of the manifest: a path, or a URL as for `ObjectSource`. Its name ends with `.snap`.
        timeout: seconds for one request of a store that is not local, retries included. By default that of the
            Monitor, 30 s.
        retries: of such a request, as for `ObjectSource`.
        kept: limit of the bytes of decompressed chunks that are kept in memory. A fault of 4 KiB needs a chunk of 64
            KiB: its neighbors are not fetched again.
        **options: for the store, as for `ObjectSource`.

    Attributes:
        url: as given; a path is absolute.

    Raises:
        StoreError: the URL does not name a snapshot.
        TypeError: no store of this kind has such an option.
    """

    local = False
    """Most bytes must be waited for, also those of a local store: they are decompressed."""
    keeps = True
    """Chunks are fetched once for all who ask, and kept for a while."""

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        timeout: float | None = None,
        retries: int | None = None,
        kept: int = _KEPT,
        **options: Unpack[StorageOptions],
    ) -> None:
        self.url: str = absolute(url)
        check_options(self.url, options)
        self._given = timeout, retries
        self._kept = kept
        self._options = options
        self._begun: tuple[float | None, int | None, Callable[[], None]] | None = None
        self._snapshot: Snapshot | None = None
        self._chunks: Chunks | None = None
        if timeout is not None:
            self.timeout = timeout  # in place of the Monitor's
        self._is_far = "://" in split(url)[0]
        if self._is_far:
            self.retries = 0  # the engine does not repeat a failed read: this source has

    @property
    def snapshot(self) -> Snapshot:
        """What is known of it. The first use opens it, and blocks: `prepare()` does not.

        Raises:
            StoreError: it is missing, damaged, or of an unknown version.
            SourceError: its store cannot be reached.
        """
        if self._snapshot is None:
            self._adopt(open_snapshot(self.url, self._options, timeout=self._given[0]))
        assert self._snapshot is not None
        return self._snapshot

    def _adopt(self, snapshot: Snapshot) -> None:
        prepare(snapshot.manifest.codec)
        self._snapshot = snapshot

    @property
    def size(self) -> int:
        """Bytes of the image. The first use opens the snapshot, and blocks. Raises as `snapshot`."""
        return self.snapshot.index.size

    def ask_size(self, meanwhile: Callable[[], None]) -> None:
        """As `size`; before a store is asked that is not local, call a function, which begins something and returns."""
        if self._snapshot is None and self._is_far:
            meanwhile()
        _ = self.snapshot

    @property
    def identity(self) -> tuple[str, str]:
        """What only the same bytes have."""
        return ("snapshot", self.validator)

    @property
    def validator(self) -> str:
        """The hash of the index, which has the hashes of all chunks."""
        return validator_of(self.snapshot.manifest)

    @property
    def sparse(self) -> bool:
        """Whether some chunks are zeros."""
        index = self.snapshot.index
        return index.records < index.chunks

    @property
    def chunk_size(self) -> int:
        """Bytes of the image in a chunk. Raises as `snapshot`."""
        return self.snapshot.index.chunk_size

    def chunk_key(self, chunk: int) -> bytes | None:
        """Return the hash of a chunk; None: it is zeros. Raises StoreError if its record is damaged."""
        record = self.snapshot.index.find(chunk)
        return None if record is None else record.hash

    async def prepare(self) -> None:
        """Open it in a thread. Canceling is safe. Raises as `snapshot`."""
        await asyncio.to_thread(getattr, self, "snapshot")

    def begin(self, timeout: float | None, retries: int | None, on_retry: Callable[[], None]) -> None:
        """Take over what the Monitor was given, as far as this source was not given its own."""
        own_timeout, own_retries = self._given
        self._begun = (
            timeout if own_timeout is None else own_timeout,
            retries if own_retries is None else own_retries,
            on_retry,
        )

    def recording(self) -> bytes | None:
        """Return the recording of first touches that was written with the snapshot; None: there is none. Blocks."""
        snapshot = self.snapshot
        link = snapshot.manifest.trace
        return None if link is None else read_linked(snapshot.store, trace_path(link), link)

    def hole(self, offset: int, length: int) -> int:
        """Return how many bytes from `offset` on are zeros that the snapshot does not hold, at most `length`."""
        index = self.snapshot.index
        first = offset // index.chunk_size
        absent = index.absent(first, -(-(offset + length) // index.chunk_size))
        return min((first + absent) * index.chunk_size - offset, length) if absent else 0

    def read_nowait(self, offset: int, length: int) -> Any:
        """Return the bytes if their chunks are kept."""
        return None if self._chunks is None else self._chunks.cut_at_hand(offset, length)

    async def read(self, offset: int, length: int) -> Any:
        """Return the bytes. Canceling is safe: what is on its way comes all the same.

        Raises:
            StoreError: a chunk is damaged, or its pack is missing.
            SourceError: the store cannot be reached. SourceTimeoutError: no answer in time.
        """
        return await self._read(offset, length, urgent=True)

    async def read_ahead(self, offset: int, length: int) -> Any:
        """As `read`, for bytes that no thread waits for: others go first."""
        return await self._read(offset, length, urgent=False)

    async def _read(self, offset: int, length: int, *, urgent: bool) -> Any:
        if self._chunks is None:
            self._chunks = Chunks(self.snapshot, self._kept, self._part)
        return await self._chunks.cut(offset, length, urgent=urgent)

    def _part(self, path: str) -> Any:
        """Return what reads an object of a store that is not local."""
        store = self.snapshot.store
        assert not isinstance(store, Folder)
        return store.part(path, *(self._begun or self._given))

    async def aclose(self) -> None:
        """Let the threads end."""
        if self._chunks is not None:
            await self._chunks.aclose()
            self._chunks = None
            if not isinstance(self.snapshot.store, Folder):
                self.snapshot.store.close()

    def travel(self) -> tuple[Any, tuple[Any, ...]]:
        """Return what makes this source without another look at the store."""
        snapshot = self.snapshot
        store = snapshot.store
        folder = Descriptor(store.fd) if isinstance(store, Folder) else None
        opened = (snapshot.manifest.encode(), Descriptor(snapshot.index_fd), folder)
        return _arrived, (self.url, *self._given, self._kept, self._options, *opened)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self.url, *self._given, self._kept, self._options)

    def __repr__(self) -> str:
        return f"SnapshotSource({hide_secrets(self.url)!r})"


def _remade(url: str, timeout: float | None, retries: int | None, kept: int, options: dict[str, Any]) -> SnapshotSource:
    return SnapshotSource(url, timeout=timeout, retries=retries, kept=kept, **options)


def _arrived(
    url: str,
    timeout: float | None,
    retries: int | None,
    kept: int,
    options: dict[str, Any],
    manifest: bytes,
    index: Descriptor,
    folder: Descriptor | None,
) -> SnapshotSource:
    """Make a source of a snapshot that another process has opened."""
    source = _remade(url, timeout, retries, kept, options)
    above, name = split(url)
    store = open_store(above, options) if folder is None else Folder(above, folder.detach())
    snapshot = Snapshot(store, name, Manifest.decode(manifest, store.name(name)), index.detach())
    source._adopt(snapshot)  # noqa: SLF001 - its own
    return source


def validator_of(manifest: Manifest) -> str:
    """Return the validator of a source of a snapshot."""
    return manifest.index.hash
