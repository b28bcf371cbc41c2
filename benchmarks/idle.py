"""What idle processors do: poll for a while, or halt at once. A wake-up costs 8 us or 2 accordingly.

The knob is the machine's, so it is put back whatever happens to the benchmark, SIGKILL included.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HALT_POLL = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")


def unavailable() -> str | None:
    """Return why it cannot be changed here, or None."""
    if not HALT_POLL.exists():
        return f"{HALT_POLL} is missing: no virtual machine, or another idle governor than haltpoll"
    return None if os.access(HALT_POLL, os.W_OK) else f"{HALT_POLL} is not writable for this user"


def regime() -> str:
    """Return what is set, in nanoseconds."""
    return HALT_POLL.read_text().strip() if HALT_POLL.exists() else "unknown"


@contextlib.contextmanager
def halt_poll(nanoseconds: int | None, knob: Path = HALT_POLL) -> Iterator[None]:
    """Have idle processors poll for so long before they halt; None: leave it as it is.

    A shell in a session of its own puts back what was set, when its standard input ends: at the end of the block, or
    with this process.
    """
    if nanoseconds is None:
        yield
        return
    before = knob.read_text().strip()
    script = 'cat >/dev/null; printf %s "$1" >"$2"'
    with subprocess.Popen(
        ["sh", "-c", script, "sh", before, str(knob)], stdin=subprocess.PIPE, start_new_session=True
    ) as guard:
        knob.write_text(str(nanoseconds))
        yield
    if guard.returncode:
        raise OSError(f"{knob} could not be set back to {before}")
