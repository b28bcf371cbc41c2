"""Settings of the machine that a run changes, and puts back whatever happens to it, SIGKILL included.

- What idle processors do: poll for a while, or halt at once. A wake-up costs 2 us or 8 accordingly.
- Free page reporting: a virtual machine gives free memory back to its host, and the first touch of what was given back
  costs up to 12 us a page, instead of the 1 us that is to be measured. Held back for a run, where that can be done.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HALT_POLL = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")
PAGE_REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")
_NEVER = "11"  # larger than any block of free pages of the usual configuration (MAX_PAGE_ORDER is 10)


def unavailable() -> str | None:
    """Return why it cannot be changed here what idle processors do, or None."""
    if not HALT_POLL.exists():
        return f"{HALT_POLL} is missing: no virtual machine, or another idle governor than haltpoll"
    return None if os.access(HALT_POLL, os.W_OK) else f"{HALT_POLL} is not writable for this user"


def regime() -> str:
    """Return what is set, in nanoseconds."""
    return HALT_POLL.read_text().strip() if HALT_POLL.exists() else "unknown"


def halt_poll(nanoseconds: int | None) -> contextlib.AbstractContextManager[object]:
    """Have idle processors poll for so long before they halt; None: leave it as it is."""
    return contextlib.nullcontext() if nanoseconds is None else setting(HALT_POLL, str(nanoseconds))


@contextlib.contextmanager
def memory_kept() -> Iterator[bool]:
    """Have free memory stay the machine's; yields whether that could be done."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(setting(PAGE_REPORTING, _NEVER))
        except OSError:  # none of that here, not permitted, or larger blocks are possible
            yield False
        else:
            yield True


@contextlib.contextmanager
def setting(knob: Path, value: str) -> Iterator[None]:
    """Have a file of the kernel's hold a value.

    A shell in a session of its own puts back what was there, when its standard input ends: at the end of the block, or
    with this process.

    Raises:
        OSError: it cannot be set, or not set back.
    """
    before = knob.read_text().strip()
    script = 'cat >/dev/null; printf %s "$1" >"$2"'
    with subprocess.Popen(
        ["sh", "-c", script, "sh", before, str(knob)], stdin=subprocess.PIPE, start_new_session=True
    ) as guard:
        knob.write_text(value)
        yield
    if guard.returncode:
        raise OSError(f"{knob} could not be set back to {before}")


BUSY: list[int] = []
"""The processes that keep the processors busy."""

_SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\n"
_SPIN += "while os.getppid() == int(sys.argv[2]):\n for _ in range(1_000_000): pass"


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep each processor busy with a process of the usual priority, which ends with this one."""
    with contextlib.ExitStack() as stack:
        for processor in sorted(os.sched_getaffinity(0)):
            command = [sys.executable, "-c", _SPIN, str(processor), str(os.getpid())]
            spinner = stack.enter_context(subprocess.Popen(command, stdin=subprocess.DEVNULL))
            stack.callback(spinner.kill)
            BUSY.append(spinner.pid)
        stack.callback(BUSY.clear)
        yield
