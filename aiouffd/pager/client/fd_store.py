"""systemd's store of file descriptors: what a service has put in it, systemd passes to the service's next start.

A store knows names and descriptors, and no pager. So all that a journal speaks of is put in it by a name that the
journal has, too, and found by that name (sd_pid_notify_with_fds(3): FDSTORE=1; sd_listen_fds_with_names(3)).

The descriptor of a forked child arrives in the worker's table, and would have to be sent from there: a kill in between
would lose it. Only a holder is without such a moment, and so memory whose forks are told is refused.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import stat
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import quote

from aiouffd.errors import PagerStartError
from aiouffd.kernel.sockets import send_within

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiouffd.pager.client.tenant import Tenant
    from aiouffd.pager.process.state import State

__all__ = ["FdStore", "inherited"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_FIRST: Final = 3  # SD_LISTEN_FDS_START
_OURS: Final = "aiouffd "
_JOURNAL, _NEXT = "journal", "journal.next"
_PATIENCE: Final = 2.0  # seconds until there is room
_LONGEST: Final = 200  # of the 255 characters that a name may have


def inherited() -> tuple[list[int], dict[str, int]]:
    """Return the descriptors that systemd has passed: of its socket units, and by name what was stored."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return [], {}
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    given: list[int] = []
    stored: dict[str, int] = {}
    for at in range(count):
        with contextlib.suppress(OSError):  # there is none, whatever was said
            os.set_inheritable(_FIRST + at, False)
        if at < len(names) and names[at].startswith(_OURS):
            stored[names[at].removeprefix(_OURS)] = _FIRST + at
        else:
            given.append(_FIRST + at)
    return given, stored


class FdStore:
    """The store of this service. Nothing blocks.

    Args:
        address: of the socket that takes notifications ($NOTIFY_SOCKET).
        found: what was stored before this start, by name.

    Attributes:
        found: as given; whoever takes a descriptor out owns it.
    """

    def __init__(self, address: str, found: dict[str, int]) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.found = found
        self._uses: dict[str, set[str]] = {}  # tenants, by the token of their pack
        self._fds: dict[str, list[int]] = {}  # of the pack
        self._notes: dict[str, Sequence[int]] = {}  # the descriptors of each
        self._known: set[str] = set()  # names in `found` that a journal speaks of

    @classmethod
    def of_systemd(cls) -> Self:
        """Return that of the service that this process is the main process of.

        Raises:
            PagerStartError: there is none.
        """
        address = os.environ.get("NOTIFY_SOCKET")
        if not address:
            raise PagerStartError("there is no systemd to keep descriptors ($NOTIFY_SOCKET is not set)")
        return cls(address, inherited()[1])

    def put(self, name: str, fd: int) -> None:
        """Store a descriptor, which stays the caller's.

        FDPOLL=0: else systemd drops a connection whose other end has closed, and a userfaultfd, which polls as broken
        when its process has ended.

        Raises:
            PagerStartError: systemd does not take it.
        """
        self._send(f"FDSTORE=1\nFDNAME={_OURS}{_key(name)}\nFDPOLL=0", [fd])

    def _put_anew(self, name: str, fd: int) -> None:
        """Store the file of a descriptor that is stored by another name."""
        try:
            mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE  # a recording is written to
            anew = os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC)
        except OSError as error:
            raise PagerStartError(f"a file cannot be kept by systemd a second time: {error.strerror}") from error
        try:
            self.put(name, anew)
        finally:
            os.close(anew)

    def remove(self, name: str) -> None:
        """Store it no longer."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={_OURS}{_key(name)}")

    def _send(self, message: str, fds: list[int] | None = None) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            send_within(notifier, _PATIENCE)  # its queue has 10 messages by default (net.unix.max_dgram_qlen)
            try:
                notifier.sendmsg([message.encode()], ancillary, 0, self._address)
            except OSError as error:
                raise PagerStartError(f"systemd takes no descriptor: {error.strerror}") from error

    # What a pager serves

    def put_tenant(self, tenant: Tenant) -> None:
        """Store what a journal says of a tenant, and of what serves it. Raises as `put`.

        An open file that is stored already is not stored again, whatever the name: it is opened anew.
        """
        token, fds = tenant.pack.token, tenant.pack.fds
        stored = {fd for other, others in self._fds.items() if other != token for fd in others}
        self._uses.setdefault(token, set()).add(tenant.token)
        self._fds[token] = fds
        for at, fd in enumerate(fds):
            put = self._put_anew if fd in stored else self.put
            put(f"pack {token} {at}", fd)
        for at, fd in enumerate(tenant.fds):
            self.put(f"space {tenant.token} {at}", fd)

    def remove_tenant(self, tenant: Tenant) -> None:
        """Store it no longer."""
        for at in range(len(tenant.fds)):
            self.remove(f"space {tenant.token} {at}")
        token = tenant.pack.token
        uses = self._uses.get(token, set())
        uses.discard(tenant.token)
        if not uses and self._uses.pop(token, None) is not None:
            for at in range(len(self._fds.pop(token))):
                self.remove(f"pack {token} {at}")

    def put_note(self, name: str, fds: Sequence[int]) -> None:
        """Store those of a note, in place of the last of its name. Raises as `put_tenant`, and stores as that."""
        stored = {fd for other, others in self._notes.items() if other != name for fd in others}
        for at, fd in enumerate(fds):
            self.remove(f"note {name} {at}")
            put = self._put_anew if fd in stored else self.put
            put(f"note {name} {at}", fd)
        self._notes[name] = [fd for fd in fds if stat.S_ISREG(os.fstat(fd).st_mode)]  # no socket: none opens anew

    def remove_note(self, name: str, fds: Sequence[int]) -> None:
        """Store them no longer."""
        self._notes.pop(name, None)
        for at in range(len(fds)):
            self.remove(f"note {name} {at}")

    def begin_journal(self, fd: int) -> None:
        """Store that of a pager which does not speak of all yet."""
        self.put(_NEXT, fd)

    def change_journal(self, fd: int) -> None:
        """It does now: it is the one that counts."""
        self.remove(_JOURNAL)
        self.put(_JOURNAL, fd)
        self.remove(_NEXT)

    def take_journal(self) -> int | None:
        """Return the one that counted, which is the caller's from now on; None: nothing was served."""
        return self.found.pop(_key(_JOURNAL if self._stored(_JOURNAL) is not None else _NEXT), None)

    def forget_unknown(self) -> None:
        """Store no longer, and close, what was passed to this start and no journal speaks of."""
        for name in self.found.keys() - self._known:
            os.close(self.found.pop(name))
            self._send(f"FDSTOREREMOVE=1\nFDNAME={_OURS}{name}")

    def numbers(self, state: State) -> dict[int, int]:
        """Return the stored descriptors by the numbers that a journal has for them; what lacks one is not in it."""
        number_of: dict[int, int] = {}
        for record in state.origins.values():
            number_of |= self._found(f"pack {record['token']}", [record["config"], *record["fds"]])
        for space in state.spaces.values():
            if not space.is_child:
                number_of |= self._found(f"space {space.token}", [space.fd, space.tether])
        for note in state.notes.values():
            number_of |= self._found(f"note {note.name}", note.fds)
        return number_of

    def _found(self, name: str, numbers: list[int]) -> Mapping[int, int]:
        stored = [self._stored(f"{name} {at}") for at in range(len(numbers))]
        return {number: fd for number, fd in zip(numbers, stored, strict=True) if fd is not None and number >= 0}

    def _stored(self, name: str) -> int | None:
        key = _key(name)
        self._known.add(key)
        return self.found.get(key)


def _key(name: str) -> str:
    """Return the name in the store, behind `_OURS`: some characters are not allowed, and its length is bounded."""
    text = quote(name, safe=" /")
    return text if len(text) <= _LONGEST else hashlib.sha256(text.encode()).hexdigest()
