"""`python -m aiouffd.pager`: says hello on the socket that it is given, and ends with who has started it."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys

from aiouffd.errors import decode_error
from aiouffd.pager.process import control
from aiouffd.pager.process.journal import Journal


def started(theirs: socket.socket, **options: object) -> subprocess.Popen[bytes]:
    """Start one."""
    command = [sys.executable, "-m", "aiouffd.pager", str(theirs.fileno()), "never"]
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return subprocess.Popen(command, pass_fds=[theirs.fileno()], **options)  # type: ignore[call-overload,no-any-return]


def test_it_says_hello_with_its_journal_and_ends_when_nobody_is_left() -> None:
    """The journal is a descriptor that comes along, and so is where descriptors are kept."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, started(theirs) as process:
        theirs.close()
        message, (fd, vault) = control.receive(ours)
        assert message["event"] == "hello"
        assert Journal(fd).counters.progress() == 0
        os.close(fd)
        os.close(vault)
        ours.shutdown(socket.SHUT_WR)
        assert process.wait(100) == 0


def test_it_cannot_start_and_says_why() -> None:
    """No file may be larger than a page: there can be no journal."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limit = (4096, 4096)
    with ours, started(theirs, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)) as process:
        theirs.close()
        message, fds = control.receive(ours)
        assert (message["event"], fds) == ("failed", [])
        assert "RLIMIT_FSIZE" in str(decode_error(message["error"]))
        assert process.wait(100) == 1
