"""Packages of any suite of Debian's, from the mirror that this machine's apt uses already.

They are unpacked beside the system: nothing is installed. What was fetched is kept in a directory of caches.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class UnobtainableError(Exception):
    """Why something cannot be had, or not be used, on this machine."""


def cache_directory() -> Path:
    """Return where what was fetched and built is kept between runs."""
    path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aiouffd-tests"
    path.mkdir(parents=True, exist_ok=True)
    return path


def mirror() -> tuple[str, str]:
    """Return the address of this machine's Debian mirror, and its keyring, from apt's own sources."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for path in files:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        text = path.read_text()
        address = re.search(r"^(?:URIs:|deb\s+(?:\[.*?\])?)\s*(\S+/debian)/?(?:\s|$)", text, re.MULTILINE)
        if address:
            keyring = re.search(r"[Ss]igned-[Bb]y[:=]\s*(/[^\s\]]+)", text)
            return address[1], keyring[1] if keyring else "/usr/share/keyrings/debian-archive-keyring.gpg"
    raise UnobtainableError("apt's sources name no Debian mirror")


def _apt(root: Path, command: str, *arguments: str, architecture: str, cwd: Path | None = None) -> str:
    """Run apt-get on directories of our own: the system's lists and packages are neither used nor changed."""
    for name in ("state/lists/partial", "cache/archives/partial", "etc/sources.list.d", "etc/preferences.d"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "status").touch()
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "Dir::State": root / "state",
        "Dir::State::status": root / "status",
        "Dir::Cache": root / "cache",
        "Dir::Etc::sourcelist": root / "etc/sources.list",
        "Dir::Etc::sourceparts": root / "etc/sources.list.d",
        "Dir::Etc::preferencesparts": root / "etc/preferences.d",
        "Acquire::Languages": "none",
        "Acquire::Retries": "1",
        "Acquire::http::Timeout": "20",
        "APT::Sandbox::User": "root",
        "APT::Get::List-Cleanup": "false",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    words = [command, "-q", *options, *arguments]
    result = subprocess.run(words, capture_output=True, text=True, timeout=480, check=False, cwd=cwd)
    if result.returncode:
        raise UnobtainableError(f"{command} {arguments[0]} failed: {(result.stderr or result.stdout).strip()[-300:]}")
    return result.stdout


def unpacked(
    name: str, suite: str, packages: Sequence[str], *, architecture: str = "amd64", dependencies: bool = False
) -> Path:
    """Return a directory with these packages of a suite of Debian's, fetched on first use and kept.

    Args:
        name: of the directory, with that of the suite.
        suite: `trixie`, `sid`, ...
        packages: their names, or regular expressions, of which the last name that matches is taken.
        architecture: as Debian calls it.
        dependencies: with all that they depend on.

    Raises:
        UnobtainableError: with the reason.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise UnobtainableError("apt-get and dpkg are needed to fetch packages")
    root = cache_directory() / f"{name}-{suite}"
    if not root.exists():
        with (cache_directory() / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not root.exists():
                _unpack(root, suite, packages, architecture, dependencies=dependencies)
    return root


def _names(packages: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the names of packages: themselves, or the last ones that match."""
    found = []
    for package in packages:
        matching = [name for name in known if name == package] or [
            name for name in known if re.fullmatch(package, name)
        ]
        if not matching:
            raise UnobtainableError(f"no package is called {package}")
        found.append(max(matching, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]))
    return found


def _unpack(target: Path, suite: str, packages: Sequence[str], architecture: str, *, dependencies: bool) -> None:
    address, keyring = mirror()
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        apt = work / "apt"
        (apt / "etc").mkdir(parents=True)
        (apt / "etc/sources.list").write_text(f"deb [signed-by={keyring}] {address} {suite} main\n")
        _apt(apt, "apt-get", "update", architecture=architecture)
        names = _names(packages, _apt(apt, "apt-cache", "pkgnames", architecture=architecture).splitlines())
        fetched = apt / "cache/archives"
        if dependencies:
            options = ("--yes", "--no-install-recommends", "--download-only")
            _apt(apt, "apt-get", "install", *options, *names, architecture=architecture)
        else:
            _apt(apt, "apt-get", "download", *names, architecture=architecture, cwd=fetched)
        root = work / "root"
        for package in sorted(fetched.glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, root], check=True, capture_output=True)
        for folder in ("bin", "lib", "lib64", "sbin"):
            if not (root / folder).exists() and (root / "usr" / folder).exists():
                (root / folder).symlink_to(f"usr/{folder}")
        with contextlib.suppress(OSError):  # another run was first
            root.rename(target)
