"""`python -m aiouffd.pager FD PICKLES`: the pager. Started by `aiouffd.pager.client.client`, not by hand."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys

from aiouffd.pager.loglines import SWITCH, Lines
from aiouffd.pager.process import control, keeper
from aiouffd.pager.process.journal import Journal
from aiouffd.pager.process.travel import Pickles


def main() -> int:
    """Run the keeper on the control socket that was inherited as descriptor FD; PICKLES: see `travel.Pickles`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the application's; the pager ends when it does
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines() if SWITCH in os.environ else logging.Formatter("%(name)s[%(process)d]: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # A descriptor for each address space and some for each client: the soft limit of 1024 is for users of select(2).
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    connection = socket.socket(fileno=int(sys.argv[1]))
    journal = Journal.create()
    try:
        control.send(connection, {"event": "hello"}, [journal.fd])
    except control.Closed:  # interrupted, whoever has started this has gone again
        return 0
    return keeper.run(journal, connection, Pickles(sys.argv[2]))


if __name__ == "__main__":
    sys.exit(main())
