"""What outlives a pager: opened anew in the next one, with the notes that its owner keeps, and told to its holder."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

from aiouffd.errors import PagerDiedError, PagerStartError, UffdError
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.pager.client.tenant import Tenant
from aiouffd.pager.client.waiting import StoppedError
from aiouffd.pager.process import control
from aiouffd.pager.process.handles import close_all
from aiouffd.pager.process.journal import Claim
from aiouffd.rpc import all_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from aiouffd.pager.client.asking import Asking
    from aiouffd.pager.client.fd_store import FdStore
    from aiouffd.pager.client.packing import Pack
    from aiouffd.pager.client.pair import Pair
    from aiouffd.pager.client.waiting import Waiter
    from aiouffd.pager.process.journal import Journal
    from aiouffd.pager.process.state import State

__all__ = ["Holding"]

log: logging.Logger = logging.getLogger("aiouffd")

_GLANCE = 0.002  # seconds between two looks at a successor's journal


class Holding:
    """Of one pager's client. Thread-safe, but for what its thread calls: `hear`, `outcome`, `reopen`.

    Args:
        requests: of the client.
        waiter: of its thread.
        tenants: of the client, by token.
        open_: asks for a tenant to be served, with what it shows and where its counters begin (None: they go on as
            `resume` has said), `again`: whatever becomes of its source.

    Attributes:
        listener: where successors ask the holder; None: there is no holder.
        lifeline: to the holder whose all is until `go`; None: there is none before this one.
        store: systemd's, which keeps what a holder would have; None: it does not. Without either no note is kept.
        on_yield: called from the client's thread: a successor has come, of this number. No client may be taken from
            then on, and once none is about to be, `yielded` is to be called with the number.
        on_kept: called from there when the successor has failed: all is served here as before.
        on_taken: called from there when the successor serves: nothing of it may be touched any more.
    """

    def __init__(
        self,
        requests: Asking,
        waiter: Waiter,
        tenants: dict[str, Tenant],
        open_: Callable[..., Future[Any]],
    ) -> None:
        self._requests = requests
        self._waiter = waiter
        self._tenants = tenants
        self._open = partial(open_, counts=None, again=True)
        self._notes: dict[str, tuple[dict[str, Any], Sequence[int]]] = {}
        self._listens = False
        self._theirs: Claim | None = None  # of a successor that is about to take all
        self._guest = OwnedDescriptor()  # its connection
        self._journal = OwnedDescriptor()  # of the newest pager
        self.listener: socket.socket | None = None
        self.lifeline: socket.socket | None = None
        self.store: FdStore | None = None
        self.on_yield: Callable[[str], None] = _nothing
        self.on_kept: Callable[[], None] = _nothing
        self.on_taken: Callable[[], None] = _nothing

    # Notes

    def keep(
        self, name: str, text: dict[str, Any], fds: Sequence[int] = (), *, pager: bool = False
    ) -> Future[Any] | None:
        """Keep a note for a successor, in place of the last of its name.

        Args:
            name: a tenant's token, and it is forgotten with the tenant; or anything else.
            text: plain values.
            fds: descriptors that the successor needs. They stay the caller's, and open until `forget`.
            pager: the pager itself needs it, also where there will be no successor.

        Returns:
            Done when the pager has it; None: nobody needs it.
        """
        if pager or self.listener is not None or self.store is not None:
            with self._requests.lock:
                if self.store is not None:
                    self.store.put_note(name, fds)
                self._notes[name] = text, fds
                return self._keep(name)
        return None

    def forget(self, name: str) -> Future[Any] | None:
        """Keep a note no longer; the future: the pager does not either. None: there is none, or nobody can be asked."""
        with self._requests.lock:
            note = self._notes.pop(name, None)
            forgotten = None
            if note is not None:
                with contextlib.suppress(UffdError):
                    forgotten = self._requests("forget", token=None, name=name)
                    if self.store is not None:
                        self.store.remove_note(name, note[1])
            return forgotten

    # systemd's store

    def put(self, tenant: Tenant) -> None:
        """Keep what a successor needs of a tenant that is about to be served.

        Raises:
            PagerStartError: systemd does not take it.
        """
        if self.store is not None:
            self.store.put_tenant(tenant)

    def remove(self, tenant: Tenant) -> None:
        """Keep it no longer, and its note neither."""
        self.forget(tenant.token)
        if self.store is not None:
            with contextlib.suppress(PagerStartError):
                self.store.remove_tenant(tenant)

    def began(self, journal: int) -> None:
        """Take note of a pager that was started, and of the descriptor of its journal, which stays the caller's."""
        if self.store is not None or self.lifeline is not None:
            self._journal.close()
            # Opened anew: systemd stores an open file once, whatever the names.
            self._journal = OwnedDescriptor(os.open(f"/proc/self/fd/{journal}", os.O_RDONLY))
        if self.store is not None:
            self.store.begin_journal(journal)

    def _keep(self, name: str) -> Future[Any]:
        text, fds = self._notes[name]
        return self._requests("keep", fds, token=None, name=name, text=text)

    # The holder

    def listen(self) -> None:
        """Have successors answered: what there is to be taken is known to the pager."""
        self._listens = True
        if self.store is not None:
            self.store.change_journal(self._journal.fileno())
        if self._requests.pair is not None:
            self._requests.pair.tell_holder("listen")

    def yielded(self, number: str) -> None:
        """Say that no client is about to be taken: all is the successor's of this number from now on."""
        if self._requests.pair is not None:
            self._requests.pair.tell_holder(f"yielded {number}")

    def starting(self, start: Callable[..., Pair]) -> Callable[..., Pair]:
        """Return a function that starts a pair, and has its holder and its journal be what they are to be."""
        return partial(start, sockets=lambda: (self.listener, self.lifeline), began=self.began)

    def succeeded(self, counts: Future[Any]) -> None:
        """The newest pair has taken over, or is asked to open all; when that is done, its holder listens."""
        self._requests.release(counts)
        pair = self._requests.pair
        if self._listens:  # unless the pair has been succeeded itself meanwhile
            counts.add_done_callback(lambda _: self.listen() if pair is self._requests.pair else None)

    def hear(self, pair: Pair) -> None:
        """Take a message of the holder."""
        said, along = pair.hear_holder()
        event, _, number = said.partition(" ")
        if event == "yield" and not along:
            log.error("another server cannot take over: this process has too many files open (RLIMIT_NOFILE)")
            pair.tell_holder("refuse")
        elif event == "yield":
            journal, self._guest = along
            self._theirs = Claim(journal.fileno())
            journal.close()
            self.on_yield(number)
        elif event == "kept":
            self._kept()
        elif event == "taken":
            self._taken()
        elif event == "lost":
            pair.close_channel()

    def _kept(self) -> None:
        if self._theirs is not None:
            self._theirs = None
            self._guest.close()
            self.on_kept()

    def _taken(self) -> None:
        self._theirs = None
        self._guest.close()
        self._waiter.stop()
        self.on_taken()

    def outcome(self, pair: Pair) -> None:
        """Wait until it is known whether a successor has taken all, where one was about to.

        The holder may have been killed. What it looks at then is looked at here.

        Raises:
            StoppedError: it has; or the client is being stopped; or this process was about to take all itself, and the
                pager that has just died was not told to go: all is the other holder's, so no other may be started.
        """
        if self.lifeline is not None:
            self._outcome_of_go(pair)
        while pair.channel is not None and self._waiter.wait(_GLANCE, pair.channel.fileno()):
            self.hear(pair)
        if self._theirs is not None:
            _hang_up(self._guest)
        while self._theirs is not None and not self._waiter.stopped:
            if not self._theirs.provisional:
                self._taken()
            elif self._waiter.wait(_GLANCE, self._guest.fileno()) and not _speaks(self._guest):
                self._kept()
        if self._waiter.stopped:
            raise StoppedError

    def _outcome_of_go(self, pair: Pair) -> None:
        """Go on where that pager was told to go, and died before it could say so: all of it is this process's."""
        if pair.journal.provisional:
            pair.hang_up()
            while pair.worker_lives and not self._waiter.stopped:  # then the word changes no more
                self._waiter.wait(_GLANCE)
        if pair.journal.provisional:
            self._requests.close(PagerDiedError("the pager has died while it took over"))
            raise StoppedError
        self.lifeline = None

    # Another pager

    def reopen(self, journal: Journal, state: State | None, children: dict[int, int]) -> Future[Any]:
        """Open all tenants and their forked children anew, as a journal says that they are; the future: they are.

        Not what is still to be opened as it was asked for. What the journal knows was opened, and only the answer was
        not heard: to ask for the same again would be to forget what was emptied or moved since.
        """
        spaces = state.spaces.values() if state is not None else ()
        lost = [space for space in spaces if space.is_child and space.identity not in children]
        if lost:
            log.error(
                "%d forked children are served no longer. The pager was killed while it read of a fork: they read zeros"
                " from now on; or too many files are open here: they wait",
                len(lost),
            )
        known = {space.token for space in spaces}
        for request in self._requests.pending:
            message = request.message
            if message["op"] == "complete" or (message["op"] == "open" and message["token"] in known):
                self._requests.answer({"id": request.message["id"], "ok": None})
        with self._requests.lock:
            tenants = [tenant for tenant in self._tenants.values() if not tenant.leaving]
            opening = [item.message for item in self._requests.pending if item.message["op"] == "open"]
            asked = {message["token"]: message["space"].get("file", "") for message in opening}
            anew = [tenant for tenant in tenants if tenant.token not in asked]
            forked = [child for tenant in tenants for child in tenant.children(state, children)]
            tokens: defaultdict[str, list[str]] = defaultdict(list)
            for token, file in (*asked.items(), *((tenant.token, tenant.file) for tenant in (*anew, *forked))):
                tokens[file].append(token)
            files = {name: tokens[name] for name in tokens if name and len(tokens[name]) > 1}
            slots = {tenant.slot for tenant in (*anew, *forked)}
            for message in opening:  # when it was asked for, others had counted less
                if message["service"]["slot"] in slots:
                    message["counts"] = None
            opened = [self._resume(journal, {tenant.slot for tenant in tenants}, list(files))]
            opened += map(self._keep, self._notes)
        opened += [self._open(tenant, tenant.shown(state)) for tenant in anew]
        opened += [self._open_child(child) for child in forked]
        opened += [self._requests("complete", token=None, name=name, tokens=files[name]) for name in files]
        for fd in children.values():  # of memory that has been left meanwhile
            os.close(fd)
        return all_of(opened)

    @property
    def journal(self) -> int:
        """The descriptor of the newest pager's journal."""
        return self._journal.fileno()

    def reach(self, lifeline: socket.socket) -> Future[Any]:
        """Have a lifeline in place of one to a holder that was killed, also in the pager."""
        self.lifeline = lifeline
        return self._requests("lifeline", [lifeline.fileno()], token=None)

    def go(self) -> Future[Any]:
        """Have all that was restored be this process's, and read."""
        going = self._requests("go", token=None)
        going.add_done_callback(self._gone)
        return going

    def _gone(self, going: Future[Any]) -> None:
        if going.exception() is None:
            self.lifeline = None

    def restore(self, journal: Journal, state: State, packs: dict[int, Pack]) -> list[Future[Any]]:
        """Open all that another server's pager has served, and that is not among the tenants: those it has no note of.

        Each future is of one of them.

        Args:
            journal: that pager's.
            state: what it amounts to; the descriptors are this process's.
            packs: by the identity of the origin.
        """
        slots = {record["slot"] for record in state.origins.values()}
        slots |= {note.text["slot"] for note in state.notes.values() if "slot" in note.text}
        opened = [self._resume(journal, slots)]
        for space in state.spaces.values():
            if not space.is_child and space.token in self._tenants:
                tenant = self._tenants[space.token]
                opened.append(self._open(tenant, tenant.mappings))
            else:
                opened.append(self._open_child(Tenant.left(space, packs[space.origin], state)))
        return opened

    def _resume(self, journal: Journal, slots: set[int], files: Sequence[str] = ()) -> Future[Any]:
        counts = [(slot, journal.counters_of(slot).words.tolist()) for slot in slots]
        return self._requests("resume", token=None, counters=journal.counters.words.tolist(), slots=counts, files=files)

    def _open_child(self, tenant: Tenant) -> Future[Any]:
        """Have memory served that is nobody's here: its descriptor is closed when the pager has it."""
        opened = self._open(tenant, tenant.mappings)
        opened.add_done_callback(lambda _: tenant.uffd.close())
        return opened


@contextlib.contextmanager
def _borrowed(guest: OwnedDescriptor) -> Iterator[socket.socket]:
    """Yield a descriptor as a socket. It is not duplicated: this process may have too many files open."""
    connection = socket.socket(fileno=guest.fileno())
    try:
        yield connection
    finally:
        connection.detach()


def _hang_up(guest: OwnedDescriptor) -> None:
    """Have a successor not wait for what the holder has not given, and ends without; what was given arrives."""
    with contextlib.suppress(OSError), _borrowed(guest) as connection:
        connection.shutdown(socket.SHUT_WR)


def _speaks(guest: OwnedDescriptor) -> bool:
    """Take a message of a successor; tell whether it lives."""
    try:
        with _borrowed(guest) as connection:
            close_all(control.receive(connection)[1])
    except (control.DescriptorsLostError, ValueError):
        return True
    except (control.Closed, OSError):
        return False
    return True


def _nothing(*_: str) -> None:
    """Do nothing."""
