"""A store in a local folder. All of it blocks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiouffd.errors import SourceError, StoreError, read_failure
from aiouffd.kernel.owned_descriptor import OwnedDescriptor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Entry", "Folder", "unwritten"]

_TRIES: Final = 5  # more tries to write, where `delete` of another process has removed an empty folder meanwhile
_PATIENCE: Final = 5.0  # seconds for others to have a folder locked
_AGAIN: Final = 0.01  # seconds between two looks
_NO_LINKS: Final = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS))  # vfat and exfat, CIFS, some of FUSE
_UNFINISHED: Final = ".part-"
"""Names of files that are being written begin so."""


class Entry(NamedTuple):
    """An object of a store.

    Attributes:
        path: from the store on.
        size: in bytes.
        modified: seconds since 1970.
    """

    path: str
    size: int
    modified: float


def unwritten(path: str) -> bool:
    """Tell whether a file is one that a writer has not finished, or has left when it was killed."""
    return path.rpartition("/")[2].startswith(_UNFINISHED)


class Folder:
    """Objects are files of mode 0600 in folders of mode 0700. One appears whole, or not at all.

    Args:
        path: of the folder.
        fd: a descriptor of it, which belongs to this object then; None: it is opened.

    Raises:
        StoreError: it cannot be opened.
    """

    is_local = True

    def __init__(self, path: str, fd: int | None = None) -> None:
        self.path: str = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
        if fd is None:
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise self.failure("", error) from error
        self._held = OwnedDescriptor(fd)

    @classmethod
    def make(cls, path: str) -> Folder:
        """Return a folder, which is made if it is not there."""
        try:
            os.makedirs(path, 0o700, exist_ok=True)  # noqa: PTH103 - as below
        except OSError as error:
            raise StoreError(path, 0, 0, f"this folder cannot be made: {error.strerror}") from error
        return cls(path)

    @property
    def fd(self) -> int:
        """A descriptor of the folder, which stays this object's."""
        return self._held.fileno()

    def is_same(self, other: object) -> bool:
        """Tell whether another store is this folder."""
        return isinstance(other, Folder) and os.path.samestat(os.fstat(self.fd), os.fstat(other.fd))

    def name(self, path: str) -> str:
        """Return what an object is called in errors."""
        return os.path.join(self.path, path) if path else self.path  # noqa: PTH118 - a text

    def failure(self, path: str, error: OSError) -> StoreError:
        """Return the error for a system call that failed."""
        missing = isinstance(error, FileNotFoundError)
        return StoreError(self.name(path), 0, 0, "it is missing" if missing else read_failure(error))

    def size(self, path: str) -> int | None:
        """Return the bytes of an object, None if there is none."""
        found = self.find(path)
        return None if found is None else found.size

    def find(self, path: str) -> Entry | None:
        """Return what is known of an object, None if there is none."""
        try:
            found = os.stat(path, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.failure(path, error) from error
        return Entry(path, found.st_size, found.st_mtime)

    def open(self, path: str) -> int:
        """Return a new descriptor of an object.

        Raises:
            StoreError: it is missing, cannot be opened, or is no regular file.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self.fd)
        except OSError as error:
            raise self.failure(path, error) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StoreError(self.name(path), 0, 0, "it is no regular file")
        return fd

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of an object, fewer where it ends before.

        Raises:
            StoreError: it is missing, or cannot be read.
        """
        fd = self.open(path)
        try:
            pieces = []
            while start < stop and (piece := os.pread(fd, stop - start, start)):
                pieces.append(piece)
                start += len(piece)
        except OSError as error:
            raise self.failure(path, error) from error
        finally:
            os.close(fd)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def put(self, path: str, parts: Iterable[Any], *, replace: bool = True, instead_of: bytes | None = None) -> bool:
        """Write an object; it is on the disk when this returns.

        Args:
            path: from the store on; its folder is made if it is not there.
            parts: buffers that follow each other.
            replace: False: an object that is there stays.
            instead_of: nothing is written unless the object is these bytes. Who writes it meanwhile, by this class,
                does so before that look, or after the write.

        Returns:
            whether it was written.

        Raises:
            StoreError: it cannot be written.
        """

        def write(fd: int) -> None:
            for part in parts:
                left = memoryview(part)
                while left:
                    left = left[os.write(fd, left) :]

        return self.fill(path, write, replace=replace, instead_of=instead_of)

    def fill(
        self, path: str, write: Callable[[int], None], *, replace: bool = True, instead_of: bytes | None = None
    ) -> bool:
        """As `put`, for an object that `write` writes to the descriptor that it is called with."""
        folder, _, name = path.rpartition("/")
        for tries in range(_TRIES, -1, -1):
            try:
                with (
                    OwnedDescriptor(self._make_folder(folder)) as within,
                    self._part(within.fileno(), write) as part,
                    self._alone(path, within.fileno(), must=instead_of is not None),
                ):
                    if instead_of is not None and self._differs(path, instead_of):
                        return False
                    return self._name(path, within.fileno(), part, name, replace=replace)
            except OSError as error:
                if not tries or not isinstance(error, FileNotFoundError):
                    raise StoreError(self.name(path), 0, 0, f"it cannot be written: {error.strerror}") from error
        raise AssertionError("the last try returns or raises")

    @contextlib.contextmanager
    def _part(self, folder: int, write: Callable[[int], None]) -> Iterator[str]:
        """Write a file, which is on the disk then, and yield its name; it goes if it has not got another one."""
        part = _UNFINISHED + secrets.token_hex(8)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with OwnedDescriptor(os.open(part, flags, 0o600, dir_fd=folder)) as file:
            try:
                write(file.fileno())
                os.fsync(file.fileno())
                yield part
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part, dir_fd=folder)

    @contextlib.contextmanager
    def _alone(self, path: str, folder: int, *, must: bool) -> Iterator[None]:
        """Have the folder locked, so that nobody else changes what has a name in it that another thing may get.

        Manifests have: they are at the top. All else is named by what it is. The lock is the open file's, and goes with
        it. Whoever can read the folder can have it, so it is not waited for long. Only who looks first must have it.
        """
        until, found = time.monotonic() + _PATIENCE, "/" in path
        while not found and time.monotonic() < until:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = True
            except BlockingIOError:
                time.sleep(_AGAIN)
        if must and not found:
            raise StoreError(self.name(path), 0, 0, "another process has its folder locked")
        yield

    def _name(self, path: str, folder: int, part: str, name: str, *, replace: bool) -> bool:
        """Give a file the name that it is to have; return False if another one has it, which is not to be replaced."""
        try:
            (os.rename if replace else _link)(part, name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            return False
        except FileNotFoundError as error:  # not to be tried again: what writes it may be at its end
            raise StoreError(self.name(path), 0, 0, "what was written of it was removed meanwhile") from error
        os.fsync(folder)
        return True

    def _differs(self, path: str, data: bytes) -> bool:
        try:
            return self.read(path, 0, len(data) + 1) != data
        except SourceError:
            if self.size(path) is None:
                return True
            raise

    def _make_folder(self, path: str) -> int:
        """Return a new descriptor of a folder below this one; each that is made is on the disk."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        for step in path.split("/") if path else ():
            with OwnedDescriptor(fd) as above:
                try:
                    os.mkdir(step, 0o700, dir_fd=above.fileno())
                    os.fsync(above.fileno())
                except FileExistsError:
                    pass
                fd = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above.fileno())
        return fd

    def list(self, path: str) -> Iterator[Entry]:
        """Yield the objects below a folder, at any depth; none if there is no such folder."""
        try:
            fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self.failure(path, error) from error
        with OwnedDescriptor(fd) as within:
            for where, _, names, below in os.fwalk(".", dir_fd=within.fileno()):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):  # it has just gone
                        found = os.stat(name, dir_fd=below)
                        inside = os.path.normpath(os.path.join(path, where, name))  # noqa: PTH118
                        yield Entry(inside, found.st_size, found.st_mtime)

    def delete(self, path: str) -> None:
        """Remove an object, and its folder if that is empty then; nothing if it is not there."""
        try:
            with OwnedDescriptor(self._make_folder("")) as within, self._alone(path, within.fileno(), must=False):
                os.unlink(path, dir_fd=self.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self.failure(path, error) from error
        folder = path.rpartition("/")[0]
        if folder.count("/"):
            with contextlib.suppress(OSError):  # it has others
                os.rmdir(folder, dir_fd=self.fd)

    def __repr__(self) -> str:
        return f"Folder({self.path!r})"


def _link(part: str, name: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
    """Give a file a name that no other has; it loses its own, perhaps. Raises FileExistsError."""
    try:
        os.link(part, name, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            os.lstat(name, dir_fd=dst_dir_fd)
        except FileNotFoundError:  # and it stays so: who gives names here by this class has the folder locked
            os.rename(part, name, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        else:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
