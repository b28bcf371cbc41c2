"""`python -m aiouffd.pager FD PICKLES [LISTENER CHANNEL [LIFELINE]]`: the pager. `client.launch` starts it."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys

if __name__ == "__main__":
    gc.disable()  # what is imported now stays: to look for garbage in it takes 5 ms

from aiouffd.errors import encode_error
from aiouffd.pager.loglines import SWITCH, Lines, NonBlockingHandler
from aiouffd.pager.process import control, inherited, keeper
from aiouffd.pager.process.child_descriptors import Vault
from aiouffd.pager.process.journal import Journal, Whose
from aiouffd.pager.process.serialization import Pickles


def main() -> int:
    """Run the keeper on the control socket that was inherited as descriptor FD; PICKLES: `serialization.Pickles`.

    LISTENER, CHANNEL: descriptors for the holder, where there is to be one. LIFELINE: a connection to the holder before
    it; what this pager serves is that one's still, until its owner says otherwise (`Journal.provisional`).
    """
    inherited.reset_signals()
    inherited.open_standard_descriptors()
    inherited.raise_limits()
    handler = NonBlockingHandler()
    handler.setFormatter(Lines() if SWITCH in os.environ else logging.Formatter("%(name)s[%(process)d]: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        journal, vault = Journal.create(), Vault.create()
        if sys.argv[5:]:  # before anybody can look
            journal.provisional = True
            journal.note_descriptor(Whose.LIFELINE, int(sys.argv[5]))
        control.send(connection, {"event": "hello"}, [journal.fd, vault.outer.fileno()])
    except control.Closed:  # interrupted, the process that has started this has gone again
        return 0
    except Exception as error:  # noqa: BLE001 - the process that has started this is told
        control.send(connection, {"event": "failed", "error": encode_error(error)})
        return 1
    gc.freeze()
    gc.enable()
    if not sys.argv[3:]:
        return keeper.run(journal, vault, connection, Pickles(sys.argv[2]))
    listener, channel = (socket.socket(fileno=int(item)) for item in sys.argv[3:5])
    keeper.run(journal, vault, connection, Pickles(sys.argv[2]), (listener, channel))
    os._exit(0)  # nothing is finalized: whatever is closed here is closed for the holder, too


if __name__ == "__main__":
    status: int = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # to finalize takes 20 ms, which whoever leaves a Monitor would wait for
