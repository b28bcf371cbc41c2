"""Descriptors that a pager cannot do without, and errors that say why there are none."""

from __future__ import annotations

import errno
import os
import resource

from aiouffd.errors import PagerStartError

__all__ = ["explained", "open_memfd", "open_pidfd"]


def open_pidfd(pid: int) -> int:
    """Return a descriptor of a process (pidfd_open(2), Linux 5.3): a number might be another's by the time it is used.

    Raises:
        PagerStartError: there is none; it says why.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise explained("pidfd_open", error) from error


def open_memfd(name: str, flags: int = os.MFD_CLOEXEC) -> int:
    """Return a file in memory (memfd_create(2)).

    Raises:
        PagerStartError: there is none; it says why.
    """
    try:
        return os.memfd_create(name, flags)
    except OSError as error:
        raise explained("memfd_create", error) from error


def explained(call: str, error: OSError) -> PagerStartError:
    """Return an error that names what was called, and which limit or filter is the likely cause."""
    refused = "a seccomp filter, as container runtimes and sandboxes install, can forbid this call"
    no_execution = "it is not executable for this user, or its file system is mounted noexec"
    causes = {
        errno.EPERM: refused,
        errno.ENOSYS: refused,
        errno.EACCES: refused if error.filename is None else no_execution,  # execve(2) names its file
        errno.EMFILE: f"the limit of open files (RLIMIT_NOFILE) is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}",
        errno.EAGAIN: "the limit of processes is reached: pids.max of the cgroup, or RLIMIT_NPROC",
        errno.ENOMEM: "there is no memory: RLIMIT_AS, or the cgroup's limit",
        errno.EFBIG: f"the limit of file sizes (RLIMIT_FSIZE) is {resource.getrlimit(resource.RLIMIT_FSIZE)[0]}",
    }
    cause = causes.get(error.errno or 0)
    return PagerStartError(f"{call}: {error.strerror}" + (f" ({cause})" if cause else ""))
