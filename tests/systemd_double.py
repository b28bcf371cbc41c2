"""A double of systemd's side of a service: $NOTIFY_SOCKET, its store of file descriptors, and $LISTEN_FDS.

It does what systemd does with the messages of sd_pid_notify_with_fds(3): an open file that it has already is not stored
again, whatever its name; all of a name are removed at once. Where systemd does not run, tests run services with it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Self

from aiouffd.kernel import libc

if TYPE_CHECKING:
    from pathlib import Path

_KCMP = {"x86_64": 312}.get(os.uname().machine, 272)
_RUN = """
import os, sys
fds = [int(item) for item in sys.argv[1].split(",") if item]
high = [os.dup(fd) for fd in fds]
for at, fd in enumerate(high):
    os.dup2(fd, 3 + at)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": sys.argv[2]}
from aiouffd.cli import main
sys.exit(main(sys.argv[3:]))
"""


def same_file(one: int, other: int) -> bool:
    """Tell whether two descriptors are of one open file (kcmp(2), KCMP_FILE)."""
    return libc.syscall(_KCMP, os.getpid(), os.getpid(), 0, one, other) == 0


class SystemdDouble:
    """Takes what a service stores, and starts the service with it.

    Args:
        directory: for the socket that takes notifications.

    Attributes:
        stored: name and descriptor of each.
        said: all other messages.
    """

    def __init__(self, directory: Path) -> None:
        self._path = str(directory / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self.stored: list[tuple[str, int]] = []
        self.said: list[str] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def start(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """Start `aiouffd` with such arguments, as the main process of the service."""
        fds = [fd for _, fd in self.stored]
        names = ":".join(name for name, _ in self.stored)
        command = [sys.executable, "-c", _RUN, ",".join(map(str, fds)), names, *arguments]
        with log.open("w") as file:
            return subprocess.Popen(
                command, pass_fds=fds, env={**os.environ, "NOTIFY_SOCKET": self._path}, stdout=file, stderr=file
            )

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 16)
            if data == b"end":
                return
            self._take(data.decode(), fds)

    def _take(self, message: str, fds: list[int]) -> None:
        values = dict(line.split("=", 1) for line in message.splitlines())
        name = values.get("FDNAME", "")
        assert len(name) < 256
        assert ":" not in name
        if values.get("FDSTORE") == "1":
            assert values["FDPOLL"] == "0"
            for fd in fds:
                if any(same_file(fd, known) for _, known in self.stored):
                    os.close(fd)
                else:
                    self.stored.insert(0, (name, fd))
        elif values.get("FDSTOREREMOVE") == "1":
            for item in [item for item in self.stored if item[0] == name]:
                self.stored.remove(item)
                os.close(item[1])
        else:
            self.said.append(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.sendto(b"end", self._path)
        self._thread.join()
        self._socket.close()
        for item in self.stored:
            os.close(item[1])
