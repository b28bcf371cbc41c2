"""The engine on the caller's own loop, for memory that only others touch: `InProcess`."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, ClassVar

import attrs

from aiouffd.engine.statistics import Counter, Counters
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.memory import address_of
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.monitor.engines.local import Local, LocalEngine
from aiouffd.monitor.engines.protecting import ProtectingUserfaultfd
from aiouffd.monitor.engines.protocol import positive_or_none
from aiouffd.native import reason
from aiouffd.native.watchdog import LoopWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.statistics import Statistics
    from aiouffd.monitor.engines.protocol import Assignment, Terms

__all__ = ["InProcess", "InProcessEngine"]


@attrs.frozen
class InProcess:
    """The loop is the caller's own, for memory that only others touch: another process, a virtual machine, C code.

    A touch with the GIL held would stop the loop that should serve it. Without a GIL it is the same: a collection of
    garbage waits until each thread that runs Python code has stopped, and one that sleeps on a page does not. The
    Monitor is entered by `async with`. A thread of the native part watches the loop. It cannot serve forked children:
    fork() would wait until the loop has read its event, and hold the GIL and the locks of malloc meanwhile.

    Args:
        spin_us: microseconds for which the loop looks for further faults before it sleeps, while faults keep coming.
        stuck_warning: seconds that a page is waited for, while the loop does not run, until a message on standard error
            says so.
        stuck_limit: seconds until the process is ended with tracebacks (SIGABRT) instead of hanging. None: never.
    """

    spin_us: int = attrs.field(default=50, validator=attrs.validators.ge(0))
    stuck_warning: float = attrs.field(default=2.0, validator=attrs.validators.gt(0.0))
    stuck_limit: float | None = attrs.field(default=5.0, validator=positive_or_none)

    features: ClassVar[Feature] = Feature.THREAD_ID
    serves_system_calls: ClassVar[bool] = True
    serves_children: ClassVar[bool] = False
    counts_here: ClassVar[bool] = True
    loop_is_here: ClassVar[bool] = True
    needs_loop: ClassVar[bool] = True

    def drops_private(self, **_: object) -> bool:
        """Its loop is here."""
        return True

    def check(self, terms: Terms) -> None:
        """Refuse fork="serve"."""
        if terms.fork == "serve":
            raise ValueError(
                "engine=InProcess() cannot serve forked children, since fork() holds the GIL until the loop has read"
                ' its event: fork="serve" needs engine=Pager()'
            )

    def make(self, loop: asyncio.AbstractEventLoop | None) -> InProcessEngine:
        """Return an engine on `loop`; without one this is a TypeError."""
        if loop is None:
            raise TypeError("engine=InProcess() serves on the caller's event loop: use `async with`, not `with`")
        return InProcessEngine(self, loop)


class InProcessEngine(LocalEngine):
    """Serves one region on a loop of this process.

    No layout event is asked for: a thread that causes one sleeps until it is read, and with the GIL held that would
    be for ever. The region's own methods tell instead.

    Attributes:
        loop: the caller's.
    """

    pids: tuple[int, ...] = ()

    def __init__(self, choice: InProcess, loop: asyncio.AbstractEventLoop) -> None:
        self._choice = choice
        self.loop: asyncio.AbstractEventLoop = loop
        self._thread = threading.get_native_id()
        self._counters = Counters()
        self._watch: LoopWatch

    def start(self, assignment: Assignment) -> None:
        """Serve the region."""
        reason()  # loads the library, in this thread and not on the loop
        asyncio.run_coroutine_threadsafe(self._begin(assignment), self.loop).result()
        words = address_of(self._counters.words)
        self._watch = LoopWatch(
            assignment.uffd.fileno(),
            assignment.mapping.start,
            self._thread,
            (words + 8 * Counter.FAULTS, words + 8 * Counter.HEARTBEAT),
            warning=self._choice.stuck_warning,
            limit=self._choice.stuck_limit,
        )

    async def _begin(self, assignment: Assignment) -> None:
        kind = Userfaultfd if assignment.can_poison else ProtectingUserfaultfd
        uffd = kind.from_fd(os.dup(assignment.uffd.fileno()), assignment.uffd.features)
        self._local = Local(self.loop, assignment, uffd, self._counters, spin_us=self._choice.spin_us)
        self._local.begin()

    def statistics(self) -> Statistics:
        """Read the counters."""
        return self._counters.snapshot()

    def check_may_wait(self) -> None:
        """Raise RuntimeError in the loop's thread."""
        if not self._local.layout.may_wait:
            raise RuntimeError("engine=InProcess() serves on this thread's event loop: await prefetch() instead")

    def refuse(self) -> None:
        """Poison what is waited for, and whatever is touched until `leave`."""
        asyncio.run_coroutine_threadsafe(self._local.refuse(), self.loop).result()

    def leave(self, settle: Callable[[], None], *, sigbus: bool) -> None:
        """Serve no longer."""
        self._watch.close()
        try:
            asyncio.run_coroutine_threadsafe(self._local.aclose(), self.loop).result()
        finally:  # where the source could not be closed as well: nobody reads any more
            self._local.end()
            settle()
