"""Errors that name the limit that has refused something."""

from __future__ import annotations

import errno
import os
import resource
from typing import Final

from aiouffd.errors import LimitError, UnsupportedError
from aiouffd.kernel import files
from aiouffd.ranges import align_up

__all__ = ["limit_error", "no_huge_pages", "no_thread"]

_LIMITS: Final = {
    errno.EFBIG: ("RLIMIT_FSIZE", "`ulimit -f` raises it"),
    errno.EMFILE: ("RLIMIT_NOFILE", "`ulimit -n` raises it"),
    errno.EAGAIN: ("RLIMIT_MEMLOCK", "the process locks its memory (mlockall); `ulimit -l` raises the limit"),
    errno.ENOMEM: (
        "RLIMIT_AS",
        "`ulimit -v` raises it; or RLIMIT_DATA (`ulimit -d`), vm.max_map_count or vm.overcommit_memory=2 refuses",
    ),
}
_HUGE_PAGES: Final = "/sys/kernel/mm/hugepages"


def limit_error(what: str, number: int) -> LimitError | None:
    """Return the error for an errno that comes from a limit; None for another errno.

    Args:
        what: could not be had.
        number: the errno.
    """
    if number == errno.ENFILE:
        value = _read("/proc/sys/fs/file-max")
        return LimitError(what, "fs.file-max", value, "`sysctl fs.file-max` raises it", number)
    if number not in _LIMITS:
        return None
    name, hint = _LIMITS[number]
    return LimitError(what, name, _value(name), hint, number)


def no_thread(what: str) -> LimitError:
    """Return the error for a thread that cannot be started: Python's RuntimeError does not say why."""
    hint = "`ulimit -u` raises it; where it is not reached, pids.max of the cgroup is"
    if (room := _value("RLIMIT_AS")) != "unlimited":
        hint += f", or RLIMIT_AS, which is {room} (`ulimit -v`): each thread has a stack"
    return LimitError(what, "RLIMIT_NPROC", _value("RLIMIT_NPROC"), hint, errno.EAGAIN)


def no_huge_pages(length: int, page_size: int) -> UnsupportedError:
    """Return the error for a mapping that the kernel has no, or too few, huge pages for."""
    size = page_size >> 10
    free = _read(f"{_HUGE_PAGES}/hugepages-{size}kB/free_hugepages")
    if free:
        count = align_up(length, page_size) // page_size
        hint = f"{free}; `sysctl vm.nr_hugepages` reserves more of the default size"
        return UnsupportedError(f"{count} free huge pages of {size} KiB", hint)
    names = os.listdir(_HUGE_PAGES) if os.path.isdir(_HUGE_PAGES) else []  # noqa: PTH112, PTH208 - names, not paths
    sizes = sorted(name.removeprefix("hugepages-") for name in names)
    return UnsupportedError(f"huge pages of {size} KiB", f"huge pages of {', '.join(sizes) or 'no size'}")


def _value(name: str) -> str:
    soft, _ = resource.getrlimit(getattr(resource, name))
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def _read(path: str) -> str:
    try:
        return files.read(path).decode("ascii").strip()
    except OSError:
        return ""
