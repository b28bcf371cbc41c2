"""The files of a cache of chunks: opened, checked, and locked against those who change them at the same time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from typing import TYPE_CHECKING, Final

from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.store.cache_index import CacheIndex
from aiouffd.store.key_locks import KeyLocks
from aiouffd.store.segments import Segments

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CacheFiles", "Exclusive", "open_folder"]

_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_USUAL_CHUNK: Final = 64 << 10
_PATIENCE: Final = 5.0  # seconds to wait for those who write to the index


def open_folder(path: str) -> OwnedDescriptor:
    """Return a descriptor of the folder of a cache, which is made if it is not there.

    Raises:
        PermissionError: it belongs to another user, or others may enter it.
        NotADirectoryError: it is no folder.
        OSError: it can neither be made nor be opened.
    """
    with contextlib.suppress(FileExistsError):
        os.makedirs(path, 0o700)  # noqa: PTH103 - a text
    folder = OwnedDescriptor(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    found = os.fstat(folder.fileno())
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EACCES, f"a cache belongs to one user, and this folder to {found.st_uid}", path)
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(errno.EACCES, "others may enter this folder: a cache has mode 0700", path)
    return folder


class Exclusive:
    """Keeps other threads and processes from changing a cache, while a block runs. It may be entered anew within.

    Args:
        file: is locked.
    """

    def __init__(self, file: OwnedDescriptor) -> None:
        self._file = file
        self._threads = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Return such a block. Raises TimeoutError."""
        with self._threads:
            if not self._depth:
                self._lock_within(_PATIENCE)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)

    def _lock_within(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:  # it was stopped there
                    raise TimeoutError(errno.ETIMEDOUT, "another process keeps it locked") from None
                time.sleep(0.0005)
            else:
                return


class CacheFiles:
    """The open files of a cache.

    Threads may use one that a cache has let go. So nobody closes it, but in forked children, which have no threads:
    else a number that is in use could become another file's.

    Args:
        path: of the folder, which is made if it is not there.
        max_bytes: limit of the bytes of the chunks.

    Attributes:
        exclusive: whoever adds or removes a segment, or writes to the index, is within such a block.
        keys: locks of chunks.
        index: which chunk lies where.
        segments: the chunks.

    Raises:
        OSError: as `open_folder`; or a file cannot be made.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        self._folder = open_folder(path)
        folder = self._folder.fileno()
        self._lock_file = OwnedDescriptor(os.open("lock", _FILE, 0o600, dir_fd=folder))
        self._keys_file = OwnedDescriptor(os.open("keys", _FILE, 0o600, dir_fd=folder))
        self.exclusive: Exclusive = Exclusive(self._lock_file)
        self.keys: KeyLocks = KeyLocks(self._keys_file)
        with self.exclusive():
            self.index: CacheIndex
            self.index, fd = CacheIndex.open(folder, max_bytes // _USUAL_CHUNK)
            self._index_file = OwnedDescriptor(fd)
        self.segments: Segments = Segments(folder, max_bytes, self.exclusive)

    def close(self) -> None:
        """Close them, in a forked child."""
        self.segments.close()
        for held in (self._lock_file, self._keys_file, self._index_file, self._folder):
            held.close()
