"""The socket file that somebody listens on: made with its mode, replaced if nobody listens there, removed at the end.

Others may be at the same name at the same moment: two that find a stale socket would each remove what is there, and one
of them the other's new one. So whoever makes a socket locks its directory (flock) from bind(2) to listen(2); between
these two, a new socket looks stale. What is removed at the end is what was made, and not what lies there by then.
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
from typing import TYPE_CHECKING, NoReturn, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SocketFile"]

_PATH_ROOM = 107  # of sockaddr_un.sun_path, and a NUL
_LOCK_TIMEOUT = 1.0


class SocketFile:
    """A listening Unix socket, and its file.

    Attributes:
        path: of the file.
        listener: non-blocking.

    Args:
        path: one that nobody listens on any more is replaced; anything else is not.
        mode: of the file, whatever the umask.
        backlog: connections that may wait.

    Raises:
        OSError: EADDRINUSE: somebody listens there; EEXIST: there is something else of that name.
    """

    def __init__(self, path: str | os.PathLike[str], *, mode: int = 0o600, backlog: int = 128) -> None:
        self.path = Path(path)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._identity: tuple[int, int] | None = None
        try:
            # bind(2) gives the file the mode of the socket, less the umask: others can connect at no moment.
            os.fchmod(self.listener.fileno(), mode)
            with _locked(self.path.parent), self._address() as address:
                self._bind(address)
                self._identity = _settle(self.path, mode)
                self.listener.listen(backlog)
            self.listener.setblocking(False)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Listen no more, and remove the file, if it is still the one that was made."""
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
        """Yield a name for the file that fits into an address: by a short one for its directory, if need be."""
        if len(os.fsencode(self.path)) <= _PATH_ROOM:
            yield str(self.path)
            return
        directory = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            address = f"/proc/self/fd/{directory}/{self.path.name}"
            if len(os.fsencode(address)) > _PATH_ROOM:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(self.path))
            yield address
        finally:
            os.close(directory)

    def _bind(self, address: str) -> None:
        try:
            self.listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
        else:
            return
        self._take_away(address)
        try:
            self.listener.bind(address)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _take_away(self, address: str) -> None:
        """Remove a socket that nobody listens on; raise where it is another thing, or somebody does."""
        found = os.lstat(address)
        if not stat.S_ISSOCK(found.st_mode):
            raise FileExistsError(errno.EEXIST, "is in the way: it is no socket", str(self.path))
        # Of another type than any listener: who listens is not bothered by a connection, which may be the only one that
        # he takes.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(address)
            except ConnectionRefusedError:
                pass
            except PermissionError:
                raise OSError(
                    errno.EADDRINUSE, "belongs to somebody else, who may be listening", str(self.path)
                ) from None
            except FileNotFoundError:  # just removed
                return
            except OSError as error:
                if error.errno != errno.EPROTOTYPE:
                    raise
                self._in_use()
            else:
                self._in_use()
        os.unlink(address)  # noqa: PTH108 - its directory may be known by a descriptor only

    def _in_use(self, why: str = "Address already in use: another server listens there") -> NoReturn:
        raise OSError(errno.EADDRINUSE, why, str(self.path)) from None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a directory against others who do the same; not for long, since anybody who can read it can lock it."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # it may be written, and not be listed
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


def _settle(path: Path, mode: int) -> tuple[int, int]:
    """Give the file the bits that the umask has taken away; return which one it is."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode):
            raise FileExistsError(errno.EEXIST, "was replaced by something that is no socket", str(path))
        if stat.S_IMODE(status.st_mode) != mode:
            Path(f"/proc/self/fd/{fd}").chmod(mode)
        return _identity(status)
    finally:
        os.close(fd)
