"""`server.jail`: a socket in a directory whose owner may do there what it likes."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from scenario import open_descriptors

from aiouffd.server import jail as module
from aiouffd.server.jail import JailedSocket
from aiouffd.server.listener import BOUND

if TYPE_CHECKING:
    from pathlib import Path, PurePath

JAILED = 12345
"""A user that is nobody else's."""
CONNECT = "import os, socket, sys; os.chroot(sys.argv[1]); os.setgroups([]); os.setgid({0}); os.setuid({0})\n"
CONNECT = CONNECT.format(JAILED) + "socket.socket(socket.AF_UNIX).connect('/run/uffd.sock')"
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives a socket to another user: needs root")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a jail's root, deeper than an address could name, whose directory `run` belongs to its user."""
    root = tmp_path / ("x" * 120) / "root"
    (root / "run").mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(root / "run", JAILED, JAILED)
    return root


def names(directory: Path) -> list[str]:
    """Return what is there."""
    return sorted(path.name for path in directory.iterdir())


@ROOT
def test_the_jails_user_connects(root: Path) -> None:
    """From within, to a socket that is its own and nobody else's; at the end nothing is left."""
    before = open_descriptors()
    with JailedSocket(root, "/run/uffd.sock", owner=(JAILED, JAILED)) as file:
        status = (root / "run" / "uffd.sock").lstat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (JAILED, JAILED, 0o600)
        assert str(file.path) == str(root / "run" / "uffd.sock")
        assert names(root / "run") == ["uffd.sock"]
        subprocess.run([sys.executable, "-c", CONNECT, str(root)], check=True, timeout=60)
        file.listener.accept()[0].close()
        with pytest.raises(OSError, match="another server listens there"):
            JailedSocket(root, "run/uffd.sock")
    assert names(root / "run") == []
    assert open_descriptors() == before


def test_what_its_user_puts_there(root: Path, tmp_path: Path) -> None:
    """No link is followed, nothing outside is touched, and what is not a socket stays."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (root / "run" / "name").symlink_to(outside / "s")
    (root / "run" / "file").write_text("precious")
    before = open_descriptors()
    for path, code in (
        ("link/s", errno.ELOOP),
        ("../outside/s", errno.EXDEV),
        ("run/../../s", errno.EXDEV),
        ("none/s", errno.ENOENT),
        ("run/name", errno.EEXIST),
        ("run/file", errno.EEXIST),
        ("run/" + "y" * 300, errno.ENAMETOOLONG),
    ):
        with pytest.raises(OSError, match=r"x/root") as caught:
            JailedSocket(root, path)
        assert caught.value.errno == code, path
    assert list(outside.iterdir()) == []
    assert names(root / "run") == ["file", "name"]
    assert (root / "run" / "file").read_text() == "precious"
    assert open_descriptors() == before
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))
    (tmp_path / "s").rename(root / "run" / "stale")
    with JailedSocket(root, "run/stale") as file:
        assert file.listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@pytest.mark.parametrize("trick", ["link", "directory"])
def test_a_trick_at_the_worst_moment(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trick: str) -> None:
    """Our own directory is replaced right after it was made: refused, and nothing outside gets a socket or an owner."""
    outside = tmp_path / "outside"
    outside.mkdir()
    open_beneath = module.open_beneath

    def replaced(directory: int, path: PurePath) -> int:
        if path.name.startswith(BOUND):
            (root / "run" / path).rename(root / "run" / "moved")
            if trick == "link":
                (root / "run" / path).symlink_to(outside)
            else:
                (root / "run" / path).mkdir(0o777)
                (root / "run" / path).chmod(0o777)
        return open_beneath(directory, path)

    monkeypatch.setattr(module, "open_beneath", replaced)
    with pytest.raises(OSError, match=r"symbolic|another directory in the place"):
        JailedSocket(root, "run/s")
    assert list(outside.iterdir()) == []
    assert not (root / "run" / "s").exists()
