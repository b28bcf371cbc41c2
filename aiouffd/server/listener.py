"""The socket file of a listener: made with its mode, in place of a stale one, and removed at the end.

Several processes may make a socket of the same name at the same moment. Two that find a stale socket would each remove
what is there, and one of them the other's new one. So a process that makes a socket locks its directory (flock) from
bind(2) to listen(2): between these two, a new socket looks stale. At the end a process removes the socket that it made,
and not another one that has the name by then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SocketFile"]

_MAX_ADDRESS = 107  # bytes of sockaddr_un.sun_path, without its NUL
_LOCK_TIMEOUT = 1.0  # seconds


class SocketFile:
    """A listening Unix socket, and its file.

    Attributes:
        path: of the file.
        listener: non-blocking.

    Args:
        path: a socket of that name on which nobody listens is replaced; anything else is left alone.
        mode: of the file, whatever the umask.
        backlog: the most connections that wait to be accepted.

    Raises:
        OSError: `filename` is the path. EADDRINUSE: another process listens there. EEXIST: the name is not a socket's.
    """

    def __init__(self, path: str | os.PathLike[str], *, mode: int = 0o600, backlog: int = 128) -> None:
        self.path: Path = Path(path)
        self.listener: socket.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._identity: tuple[int, int] | None = None
        try:
            # bind(2) gives the file the mode of the socket, less the umask: at no moment can others connect.
            os.fchmod(self.listener.fileno(), mode)
            with _locked(self.path.parent), self._address() as address:
                self._bind(address)
                self._identity = _set_mode(self.path, mode)
                self.listener.listen(backlog)
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
            if self._identity == _identity(self.path.lstat()):
                self.path.unlink()
        self._identity = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _address(self) -> Iterator[str]:
        """Yield a name of the file that fits into a socket address: a long path goes by its directory's descriptor."""
        if len(os.fsencode(self.path)) <= _MAX_ADDRESS:
            yield str(self.path)
            return
        directory = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            address = f"/proc/self/fd/{directory}/{self.path.name}"
            if len(os.fsencode(address)) > _MAX_ADDRESS:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            yield address
        finally:
            os.close(directory)

    def _bind(self, address: str) -> None:
        try:
            self.listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(address)
            self.listener.bind(address)


def _remove_stale(address: str) -> None:
    """Remove a socket on which nobody listens.

    Raises:
        OSError: EADDRINUSE: somebody does. EEXIST: it is not a socket.
    """
    if not stat.S_ISSOCK(os.lstat(address).st_mode):
        raise FileExistsError(errno.EEXIST, "is in the way: it is not a socket")
    # The type differs from that of any listener. So a process that listens gets no connection, which may be the only
    # one that it takes.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(address)  # noqa: PTH108 - its directory may be known by a descriptor only
        except FileNotFoundError:  # just removed
            return
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
def _locked(directory: Path) -> Iterator[None]:
    """Lock a directory against others who do the same; not for long: whoever can read a directory can lock it."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # it may be writable, and not readable
        yield
        return
    try:
        end = time.monotonic() + _LOCK_TIMEOUT
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        yield
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
