"""The socket file of a listener: made with its mode, in place of a stale one, and removed at the end.

A client may wait for the name and connect at once, so a name that is there must be one that listens. bind(2) comes
before listen(2). So the socket is bound to a name of its own, which ss(8) shows, and gets the one that was asked for by
link(2) when it listens. link(2) replaces nothing.

Several processes may make a socket of the same name at the same moment. Two that find a stale socket would each remove
what is there, and one of them the other's new one. So a process locks the directory (flock) meanwhile. It removes the
sockets that others were bound to there: they were killed. At the end a process removes the socket that it made, and not
another one that has the name by then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BOUND", "SocketFile"]

_MAX_ADDRESS = 107  # bytes of sockaddr_un.sun_path, without its NUL
_LOCK_TIMEOUT = 1.0  # seconds
_TRIES = 100
BOUND: Final = ".aiouffd-socket-"
"""The names that sockets are bound to begin so."""


class SocketFile:
    """A listening Unix socket, and its file.

    Attributes:
        path: of the file.
        listener: non-blocking.

    Args:
        path: a socket of that name on which nobody listens is replaced; anything else is left alone.
        mode: of the file, whatever the umask.
        owner: user and group of the file; -1 for one leaves it as it is. To give it to another user takes CAP_CHOWN.
        backlog: the most connections that wait to be accepted.
        kind: of the socket.
        made: one that listens already, of a process before this one; its file is taken over as it is. It stays the
            caller's where that fails.

    Raises:
        OSError: `filename` is the path. EADDRINUSE: another process listens there. EEXIST: the name is not a socket's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: int = 0o600,
        owner: tuple[int, int] = (-1, -1),
        backlog: int = 128,
        kind: socket.SocketKind = socket.SOCK_STREAM,
        made: socket.socket | None = None,
    ) -> None:
        self.path: Path = Path(path)
        self._file = self.path  # as this process reaches it
        self._mode, self._owner = mode, owner
        self.listener: socket.socket = made or socket.socket(socket.AF_UNIX, kind)
        self._identity: tuple[int, int] | None = None
        if made is not None:
            with self._addresses() as (_, wanted), contextlib.suppress(FileNotFoundError):
                self._identity = _identity(wanted.lstat())
            return
        try:
            # bind(2) gives the file the mode of the socket, less the umask: at no moment can others connect.
            os.fchmod(self.listener.fileno(), mode)
            with self._addresses() as (bound, wanted), _locked(wanted.parent) as locked:
                if locked:
                    _remove_left(bound.parent)
                self._listen(bound, wanted, backlog)
            self.listener.setblocking(False)
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop listening, and remove the file, if it is still the one that was made."""
        self.listener.close()
        with contextlib.suppress(OSError):
            if self._identity == _identity(self._file.lstat()):
                self._file.unlink()
        self._identity = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _addresses(self) -> Iterator[tuple[Path, Path]]:
        """Yield the name to bind to and that of the file; if they are too long, by their directory's descriptor."""
        directory, name = self.path.parent, BOUND + secrets.token_hex(8)
        if _fit(directory / name, self.path):
            yield directory / name, self.path
            return
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            directory = Path(f"/proc/self/fd/{fd}")
            if not _fit(directory / name, directory / self.path.name):
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            yield directory / name, directory / self.path.name
        finally:
            os.close(fd)

    def _listen(self, bound: Path, wanted: Path, backlog: int) -> None:
        self.listener.bind(str(bound))
        try:
            self._identity = _set_mode(bound, self._mode)
            if self._owner != (-1, -1):
                os.chown(bound, *self._owner, follow_symlinks=False)
            self.listener.listen(backlog)
            _link(bound, wanted)
        finally:
            bound.unlink()


def _fit(*paths: Path) -> bool:
    return all(len(os.fsencode(path)) <= _MAX_ADDRESS for path in paths)


def _link(bound: Path, wanted: Path) -> None:
    for _ in range(_TRIES):  # in a jail, its user may put a stale one there again and again
        try:
            return wanted.hardlink_to(bound)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # just removed
                _remove_stale(wanted)
    raise OSError(errno.EBUSY, "another process makes sockets of this name again and again")


def _remove_left(directory: Path) -> None:
    """Remove what processes were bound to that were killed before they were done."""
    for left in directory.glob(f"{BOUND}*"):
        with contextlib.suppress(OSError):
            _remove_stale(left)


def _remove_stale(path: Path) -> None:
    """Remove a socket on which nobody listens.

    Raises:
        OSError: EADDRINUSE: somebody does. EEXIST: it is not a socket. ENOENT: it has gone.
    """
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise FileExistsError(errno.EEXIST, "is in the way: it is not a socket")
    # The type differs from that of any listener. So a process that listens gets no connection, which may be the only
    # one that it takes.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except PermissionError:
            raise OSError(errno.EADDRINUSE, "belongs to another user, who may be listening") from None
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
            raise _in_use() from None
        else:
            raise _in_use()


def _in_use() -> OSError:
    return OSError(errno.EADDRINUSE, "Address already in use: another server listens there")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Lock a directory against others who do the same. Yield whether it is locked.

    It is not waited for long: whoever can read a directory can lock it.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # it may be writable, and not readable
        yield False
        return
    locked = False
    try:
        end = time.monotonic() + _LOCK_TIMEOUT
        while not locked and time.monotonic() < end:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                time.sleep(0.01)
        yield locked
    finally:
        os.close(fd)


def _set_mode(path: Path, mode: int) -> tuple[int, int]:
    """Give the file the bits that the umask has cleared; return its identity."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode):
            raise FileExistsError(errno.EEXIST, "was replaced by something that is not a socket")
        if stat.S_IMODE(status.st_mode) != mode:
            Path(f"/proc/self/fd/{fd}").chmod(mode)
        return _identity(status)
    finally:
        os.close(fd)
