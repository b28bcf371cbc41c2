"""A socket in the root directory of a jail, where the jail's user can write, too.

Whoever can write in a directory can replace what is there, at any moment, by a symbolic link or by another file. So no
path is resolved twice. The directory of the socket is opened once, by openat2(2) below the jail's root and without
following a link, and all that follows goes by its descriptor. The socket is bound in a directory that only this user
may enter. There it gets its mode and its owner, and a name in the jail when it listens. A path of any length will do:
a socket address has room for 107 bytes, and a descriptor's name is short.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import struct
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Final

from aiouffd.kernel import abi, libc
from aiouffd.kernel.memory import address_of
from aiouffd.server.listener import BOUND, SocketFile

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

__all__ = ["JailedSocket", "open_beneath"]

_HOW = struct.Struct("=QQQ")  # struct open_how: flags, mode, resolve
_RESOLVE_NO_SYMLINKS: Final = 0x04
_RESOLVE_BENEATH: Final = 0x08
_TRIES = 100  # EAGAIN: something was renamed while ".." was resolved


def open_beneath(root: int, path: PurePath) -> int:
    """Open a directory below another one, without following symbolic links (openat2(2), Linux 5.6).

    Args:
        root: a descriptor of that one.
        path: relative to it.

    Raises:
        OSError: ELOOP: a part of it is a symbolic link. EXDEV: it leads out of the root.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    how = bytearray(_HOW.pack(flags, 0, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS))
    name = bytearray(os.fsencode(path) + b"\0")
    for attempt in range(_TRIES):
        try:
            return libc.syscall(abi.SYS_OPENAT2, root, address_of(name), address_of(how), _HOW.size)
        except OSError as error:
            if error.errno != errno.EAGAIN or attempt == _TRIES - 1:
                raise
    raise AssertionError  # not reached


class JailedSocket(SocketFile):
    """A listening socket below the root of a jail.

    Args:
        root: the jail's root directory; it is the operator's, and may be reached by links.
        path: of the socket, as the jail sees it.
        mode: of the file, whatever the umask.
        owner: user and group of the file; -1 for one leaves it as it is.
        backlog: the most connections that wait to be accepted.
        made: as for `SocketFile`.

    Raises:
        OSError: as for `SocketFile`. ELOOP: a part of the path is a symbolic link. EXDEV: it leads out of the jail.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        mode: int = 0o600,
        owner: tuple[int, int] = (-1, -1),
        backlog: int = 128,
        made: socket.socket | None = None,
    ) -> None:
        self._root = Path(root)
        self._inside = PurePath(os.fspath(path).lstrip("/"))
        self._directory = -1
        try:
            super().__init__(self._root / self._inside, mode=mode, owner=owner, backlog=backlog, made=made)
        except BaseException:
            self._leave()
            raise

    def close(self) -> None:
        """Stop listening, and remove the file, if it is still the one that was made."""
        super().close()
        self._leave()

    def _leave(self) -> None:
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    @contextlib.contextmanager
    def _addresses(self) -> Iterator[tuple[Path, Path]]:
        with contextlib.ExitStack() as stack:
            root = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, root)
            self._directory = open_beneath(root, self._inside.parent)
            self._file = _by_descriptor(self._directory) / self._inside.name
            name = BOUND + secrets.token_hex(8)
            os.mkdir(name, 0o700, dir_fd=self._directory)
            stack.callback(_remove_directory, name, self._directory)
            private = open_beneath(self._directory, PurePath(name))
            stack.callback(os.close, private)
            status = os.fstat(private)
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise OSError(errno.EACCES, "its user has put another directory in the place of one of ours")
            yield _by_descriptor(private) / "socket", self._file


def _by_descriptor(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}")


def _remove_directory(name: str, directory: int) -> None:
    with contextlib.suppress(OSError):  # the jail's user may have moved it
        os.rmdir(name, dir_fd=directory)
