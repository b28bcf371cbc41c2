"""The guard of an in-process Monitor: a small process that finds its loop stuck behind a fault, says so, and ends it.

With `engine=InProcess()` a thread that touches a missing page while it holds the GIL stops the loop that should serve
it: for ever, and nothing in that process can so much as say why. The guard holds a duplicate of the descriptor. It
looks a few times a second whether a message lies unread while the engine's count of faults stands still. Then it
reads the message, which tells thread and address, and wakes the thread again: it faults once more, the message is
queued anew, and nothing was taken from the loop, should it come back. If it does not until the limit, the page is
poisoned: SIGBUS in the thread that touched, whose traceback faulthandler writes.
"""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from aiouffd.engine.statistics import Counter, Counters
from aiouffd.kernel.events import PageFault
from aiouffd.kernel.memory import map_shared
from aiouffd.kernel.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Guard"]

log = logging.getLogger("aiouffd.guard")


class Guard:
    """Starts the guard of a descriptor; `close()` ends it.

    Args:
        uffd: stays the caller's.
        counters: the descriptor of the memfd that the engine counts in.
        page_size: in bytes.
        warning: seconds until it says that the loop is stuck.
        limit: seconds until the page is poisoned.
    """

    def __init__(self, uffd: Userfaultfd, counters: int, page_size: int, warning: float, limit: float) -> None:
        fds = [uffd.fileno(), counters, os.pidfd_open(os.getpid())]
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "aiouffd.monitor.engines.guard",
                    *map(str, (*fds, page_size, warning, limit)),
                ],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(fds[2])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _faults(uffd: Userfaultfd) -> Iterator[PageFault]:
    return (event for event in uffd.read() if isinstance(event, PageFault))


def watch(uffd: Userfaultfd, counters: Counters, pidfd: int, page_size: int, warning: float, limit: float) -> None:
    """Look until the process that `pidfd` stands for has ended."""
    process = select.poll()
    process.register(pidfd, select.POLLIN)
    descriptor = select.poll()
    descriptor.register(uffd.fileno(), select.POLLIN)
    stuck_since: float | None = None
    warned = False
    count = -1
    while not process.poll(min(warning, 1.0) * 250):
        served = counters.words[Counter.FAULTS]
        if not descriptor.poll(0) or served != count:
            stuck_since, warned, count = None, False, served
            continue
        now = time.monotonic()
        if stuck_since is None:
            stuck_since = now
        elif now - stuck_since >= limit:
            for fault in _faults(uffd):
                page = fault.address & -page_size
                log.error("giving up: the page at %#x is poisoned, thread %d gets SIGBUS", page, fault.thread_id)
                uffd.try_poison(page, page_size, 0)
        elif now - stuck_since >= warning and not warned:
            warned = True
            for fault in _faults(uffd):
                log.error(
                    "thread %d has been waiting for the page at %#x for %.1f s, and the event loop that should serve"
                    " it does not run. It was touched in that loop's own thread, or with the GIL held: leave out"
                    " engine=InProcess() (a pager process serves any touch), or `await monitor.prefetch(...)` first."
                    " The page is poisoned in %.1f s",
                    *(fault.thread_id, fault.address, now - stuck_since, limit - (now - stuck_since)),
                )
                uffd.try_wake(fault.address & -page_size, page_size)


def main() -> None:
    """`python -m aiouffd.monitor.engines.guard UFFD COUNTERS PIDFD PAGE_SIZE WARNING LIMIT`."""
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    uffd, counters, pidfd, page_size = map(int, sys.argv[1:5])
    warning, limit = map(float, sys.argv[5:7])
    watch(Userfaultfd.from_fd(uffd), Counters(map_shared(counters)), pidfd, page_size, warning, limit)


if __name__ == "__main__":
    main()
