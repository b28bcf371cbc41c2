"""What a worker serves: spaces and where their pages come from. What changes is in the journal before it counts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.ahead.fill import bring_ahead
from aiouffd.engine.allowance import Allowances
from aiouffd.engine.dispatcher import Dispatcher
from aiouffd.engine.flight import spawn
from aiouffd.engine.messages import COUNTER_OF_EVENT
from aiouffd.engine.space import Space
from aiouffd.errors import ClosedError, PagerStartError
from aiouffd.handoff.own_threads import Unneeded, close_foreign
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.limits import limit_error
from aiouffd.pager.process.common_files import CommonFiles
from aiouffd.pager.process.inaccessible import Protection
from aiouffd.pager.process.journal import JournalFullError
from aiouffd.pager.process.notes import Notes
from aiouffd.pager.process.rewriting import Rewriting, Room
from aiouffd.pager.process.state import Kind, Meta, SpaceState, State
from aiouffd.pager.process.tenancy import (
    Arrivals,
    Commons,
    Origin,
    Tenancy,
    build,
    let_go,
    options_of,
    rebuild,
    tell_flight,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from aiouffd.engine.options import Options
    from aiouffd.errors import UffdError
    from aiouffd.pager.process.child_descriptors import Vault
    from aiouffd.pager.process.journal import Journal
    from aiouffd.pager.process.replay import Replay

__all__ = ["PROVISIONAL", "Served", "or_end"]

PROVISIONAL = "provisional"
"""Why a space is not read: it is another pager's still."""

log: logging.Logger = logging.getLogger("aiouffd.pager")


def _not_opened(error: Exception) -> PagerStartError:
    """Return why a source or handler is not served."""
    if isinstance(error, JournalFullError):
        return PagerStartError("there is no room for another source: the pager's journal is full")
    what = "the source or handler arrived, but could not be rebuilt"
    limit = limit_error(what, getattr(error, "errno", None) or 0)
    return PagerStartError(str(limit or f"{what}: {error}"))


@contextlib.contextmanager
def or_end() -> Iterator[None]:
    """End this worker where the block fails, which serves what another has served.

    Threads and requests would wait for it for ever. The journal has it, and the next worker may do better.
    """
    try:
        yield
    except Exception:
        log.exception("what another worker has served could not be taken over: this one ends")
        os._exit(1)


class Served:
    """Used on the worker's loop.

    Args:
        loop: the worker's.
        journal: where a successor finds all of this.
        vault: where descriptors of forked children are kept.
        on_error: called with a space's token and its error.
        tell: sends an event to the client, as `Outbox.put`.
        on_idle: called when nothing is left to be served.
        on_owner_exit: called when the process that has started this pager has ended.

    Attributes:
        origins: by identity.
        tenancies: by the identity of the space.
        protection: has pages made inaccessible that cannot be had, on old kernels.
        waiting: spaces whose source is being opened again, by identity.
        arrivals: of spaces whose source is being opened, for the first time or again.
        files: those of memory that spaces map.
        notes: what the pager's owner has to know.
        tasks: that end by themselves.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        journal: Journal,
        vault: Vault,
        *,
        on_error: Callable[[str, UffdError], None],
        tell: Callable[..., bool],
        on_idle: Callable[[], None],
        on_owner_exit: Callable[[], None],
    ) -> None:
        self._loop = loop
        self.journal = journal
        self._vault = vault
        self._on_error = on_error
        self._tell = tell
        self.protection: Protection = Protection(loop, tell, lambda: self.meta.owner)
        self._on_idle = on_idle
        self._on_owner_exit = on_owner_exit
        self.meta: Meta = Meta()
        self.origins: dict[int, Origin] = {}
        self._restoring: dict[int, dict[str, Any]] = {}  # records of origins that are being opened again
        self.tenancies: dict[int, Tenancy] = {}
        self._commons = Commons(partial(tell_flight, self.tenancies, tell))
        self.waiting: dict[int, SpaceState] = {}
        self._unneeded = Unneeded(loop)
        self.notes: Notes = Notes(self._write, self._unneeded.add)
        self.arrivals: Arrivals = Arrivals()
        self.tasks: set[asyncio.Task[None]] = set()
        self.dispatcher: Dispatcher = Dispatcher(
            loop, journal.counters, spin_us=self.meta.spin_us, landing=journal, on_drop=self._dropped, on_idle=self.idle
        )
        journal.next_identity = lambda: self.meta.next
        journal.keep = self._keep
        self._allowances = Allowances()
        self.files: CommonFiles = CommonFiles(self)
        self._room = Room(self.dispatcher, journal, self._error)
        self._rewriting = Rewriting(journal, loop, state=self.state, space=self._space_state, on_full=self._room.full)

    # State

    def state(self) -> State:
        """Return all that a successor needs; the mappings are not copied."""
        spaces = {at: state for at in (*self.waiting, *self.tenancies) if (state := self._space_state(at)) is not None}
        return State(attrs.evolve(self.meta), self._records(), spaces, dict(self.notes.kept))

    def _records(self) -> dict[int, dict[str, Any]]:
        return self._restoring | {identity: origin.record for identity, origin in self.origins.items()}

    def _space_state(self, identity: int) -> SpaceState | None:
        tenancy = self.tenancies.get(identity)
        if tenancy is None or tenancy.space is None:
            return self.waiting.get(identity)
        return tenancy.state(tenancy.space)

    def take_identity(self) -> int:
        """Return a number that nothing else has."""
        self.meta.next += 1
        return self.meta.next - 1

    def note_meta(self, **changes: Any) -> None:
        """Change what is known besides spaces and origins, and write it down."""
        self.meta = attrs.evolve(self.meta, **changes)
        self._write((Kind.META, 0, json.dumps(attrs.asdict(self.meta)).encode()))

    def _write(self, *items: tuple[Kind, int, bytes]) -> None:
        try:
            self.journal.append(*items)
        except JournalFullError:
            self._rewriting.make_room()
            self.journal.append(*items)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is served."""
        return not self.dispatcher.spaces and not self.waiting

    def idle(self) -> None:
        """Nothing is served by the dispatcher any more."""
        if self.is_empty:
            self._on_idle()

    def own(self, pidfd: int) -> None:
        """Note the process that owns this: end-of-file does not tell, since its forked children hold the connection."""
        if pidfd != self.meta.owner:  # else a predecessor has noted it
            self.note_meta(owner=pidfd)
        self._loop.add_reader(pidfd, self._owner_exited)

    def _owner_exited(self) -> None:
        """The owner is gone; its forked children, or others that it had served, may live on."""
        self._loop.remove_reader(self.meta.owner)
        for space in list(self.dispatcher.spaces.values()):
            if space.uffd.gone():
                space.gone()
                self.dispatcher.drop(space)
        self.files.await_more()
        self._on_owner_exit()

    # Origins

    async def open_origin(self, record: dict[str, Any], counts: list[int] | None) -> Origin:
        """Open a source or handler, or return the one that this is already; the descriptors are taken either way.

        Args:
            record: how it came here.
            counts: where the counters in its slot begin, unless another origin counts there already; None: they go on.

        Raises:
            PagerStartError: it could not be rebuilt.
        """
        for known in self.origins.values():
            if known.record["token"] == record["token"]:
                self._unneeded.add(record["config"], *record["fds"])
                return known
        try:
            if counts is not None and all(other["slot"] != record["slot"] for other in self._records().values()):
                self.journal.use_slot(record["slot"], counts, record.get("user", 0))
            origin = await build(self.journal.counters_of(record["slot"]), self.take_identity(), record, self._commons)
            self.origins[origin.identity] = origin  # a log that is written anew meanwhile has it
            self._write(_record_of(origin.identity, record))
        except Exception as error:
            self.origins = {number: its for number, its in self.origins.items() if its.record is not record}
            close_foreign((record["config"], *record["fds"]))
            if isinstance(error, PagerStartError):
                raise
            raise _not_opened(error) from error
        return origin

    def retire(self, origin: Origin) -> None:
        """Let go what serves nobody any more."""
        is_used = any(tenancy.origin is origin for tenancy in self.tenancies.values())
        if is_used or self.origins.pop(origin.identity, None) is None:
            return
        self.journal.append((Kind.RETIRED, origin.identity, b""))  # a successor must not look for its descriptors
        self.spawn(let_go(origin))

    def spawn(self, work: Any) -> None:
        """Have a coroutine run to its end."""
        spawn(self.tasks, work)

    # Spaces

    def open(self, state: SpaceState, origin: Origin) -> Space:
        """Serve a space that was not served before.

        Raises:
            PagerStartError: the journal has no room for it. The descriptors are closed.
        """
        space = self._serve(state, origin)
        self.files.served([space])
        try:
            self._note(state, origin.options)
        except PagerStartError:  # what the others have is kept
            self.dispatcher.drop(space)
            raise
        return space

    def open_again(self, record: dict[str, Any], state_of: Callable[[int], SpaceState]) -> None:
        """Serve a space that another pager has served, once its source is there: it waits as one of a predecessor does.

        Args:
            record: how what serves it came here, its descriptors taken.
            state_of: returns what the space is, of the identity of its origin.

        Raises:
            PagerStartError: the journal has no room for it. The descriptors are closed.
        """
        known = {its["token"]: number for number, its in self._records().items()}.get(record["token"])
        number = self.take_identity() if known is None else known
        state = state_of(number)
        self.waiting[state.identity] = state
        if known is None:
            self._restoring[number] = record
        try:
            self._note(state, options_of(record), *([_record_of(number, record)] if known is None else ()))
        except PagerStartError:
            del self.waiting[state.identity]
            if known is None:
                del self._restoring[number]
            close_foreign([fd for fd in (state.fd, state.tether, record["config"], *record["fds"]) if fd >= 0])
            raise
        self.arrivals.expect(state.token)
        if known is None:
            self.spawn(self._restore_origin(number, record, []))
        else:
            self._unneeded.add(record["config"], *record["fds"])
        if number in self.origins:
            self._restore_spaces(self.origins[number], [])

    def _note(self, state: SpaceState, options: Options, *records: tuple[Kind, int, bytes]) -> None:
        has_others = len(self.tenancies) + len(self.waiting) > 1
        self.dispatcher.spin_us = max(self.dispatcher.spin_us if has_others else 0, options.spin_us)
        if state.is_child:  # before the journal knows of it: whoever reads that looks for the descriptor
            self._keep(state.identity, state.fd)
        try:
            if self.meta.spin_us != self.dispatcher.spin_us:
                self.note_meta(spin_us=self.dispatcher.spin_us)
            self._write(*records, *_records_of(state))
        except JournalFullError as error:
            raise PagerStartError(f"no room for {len(state.mappings)} more mappings: the journal is full") from error

    def _serve(self, state: SpaceState, origin: Origin) -> Space:
        options, limits = origin.options, origin.options.limits
        allowance = self._allowances.of(state.payer, limits.client_events, limits.client_bytes, origin.counters)
        space = Space(
            self.protection.userfaultfd(state, metered=allowance is not None),
            state.mappings,
            page_size=state.page_size,
            backend=origin.backend,
            counters=origin.counters,
            readahead=origin.readahead(state.page_size, self.notes),
            identity=state.identity,
            # A server's options are for all clients; one that tracks its writes says so by the feature.
            write_protect=options.write_protect or bool(state.features & Feature.WP_ASYNC),
            on_error=self._error,
            retries=options.on_error != "sigbus",
            on_child=self._forked,
            allowance=allowance,
            file=self.files.of(state.file),
        )
        space.replayed, space.filled = state.replayed, state.filled
        if state.changed:  # what was brought may have gone with its mapping: see `complete`
            space.born = -1
        tenancy = Tenancy(origin, state.token, state.tether, is_child=state.is_child, own=state.own, space=space)
        self.tenancies[space.identity] = tenancy
        self.dispatcher.add(space)
        if self.journal.provisional:
            self.dispatcher.hold(space, PROVISIONAL)
        if not tenancy.is_child:
            ahead = bring_ahead(
                space, origin.backend, origin.service.trace, options.background, lambda: self._progress(space)
            )
            tenancy.ahead = self._loop.create_task(ahead)
        return space

    def _progress(self, space: Space) -> None:
        try:
            self._write((Kind.AHEAD, space.identity, struct.pack("=qq", space.replayed, space.filled)))
        except JournalFullError:
            log.debug("what was brought ahead is brought again by a successor")

    def _forked(self, parent: Space, child: Space) -> None:
        child.identity = self.take_identity()  # the journal has foreseen it
        of_parent = self.tenancies[parent.identity]
        self.tenancies[child.identity] = Tenancy(of_parent.origin, of_parent.token, is_child=True, space=child)
        self.dispatcher.add(child)

    def _keep(self, identity: int, fd: int) -> None:
        """Keep the descriptor of a forked child for the case that keeper and worker are killed at once.

        Before anything else is done about it: its process runs since the fork was read, and nobody else can have it.
        """
        if not self._vault.keep(identity, fd, len(self.tenancies)):
            self._renew_vault((identity, fd))

    def _renew_vault(self, *further: tuple[int, int]) -> None:
        known = [(each.identity, each.fd) for each in self.state().spaces.values() if each.is_child]
        if not self._vault.renew([*known, *further]):
            log.error("there are too many forked children: if the whole pager is killed, some of them read zeros")

    def _dropped(self, space: Space) -> None:
        """Tell the successor before the descriptor's number can mean something else."""
        self.journal.append((Kind.CLOSED, space.identity, b""))
        tenancy = self.tenancies.pop(space.identity)
        tenancy.end()
        if not tenancy.is_child:
            self.notes.forget(tenancy.token)
        if tenancy.announced:
            self._tell({"event": "gone", "token": tenancy.token})
        self.retire(tenancy.origin)
        self._rewriting.closed()
        if self._room.awaited:
            self._loop.call_soon(self._room.release, self._rewriting.make_room)

    def _error(self, space: Space, error: UffdError) -> None:
        log.error("%s", error)
        tenancy = self.tenancies.get(space.identity)
        if tenancy is not None:  # else it has been dropped meanwhile
            self._on_error(tenancy.token, error)

    def family_of(self, token: str) -> list[Space]:
        """Return a space and its forked children."""
        tokens = {space: self.tenancies[space.identity].token for space in self.dispatcher.spaces.values()}
        return [space for space, its in tokens.items() if its == token or its.startswith(f"{token}/")]

    def find(self, token: str) -> Space | None:
        """Return the space of a token."""
        orphaned, its = "/" in token, self.tenancies.values()
        return next((at.space for at in its if at.token == token and (orphaned or not at.is_child)), None)

    async def wanted(self, token: str) -> tuple[Space, Tenancy]:
        """Return the space of a token, once its source has been opened.

        Raises:
            ClosedError: it is served no longer.
        """
        await self.arrivals.wait(token)
        space = self.find(token)
        if space is None:
            raise ClosedError("it is served no longer")
        return space, self.tenancies[space.identity]

    # Taking over

    def write_all(self, state: State) -> None:
        """Begin the journal anew with a state. Raises JournalFullError."""
        self.journal.change(self.journal.write_anew(0, state.encode()))

    def restore(self, end: Replay, identity: int, built: dict[int, Origin] | None = None) -> None:
        """Serve what a predecessor has served, which is in the journal: its events, and the faults that it had read.

        What a source that does not answer serves waits for it; the others do not.

        Args:
            end: what the journal amounts to.
            identity: the space whose events landed, and were not committed.
            built: what serves, where it is here already.
        """
        state = end.state
        used: dict[int, list[SpaceState]] = defaultdict(list)
        for space in state.spaces.values():
            used[space.origin].append(space)
            self.waiting[space.identity] = space
            self.arrivals.expect(space.token)
        self._renew_vault()  # before anything else: see `_keep`
        if end.fresh:
            first = state.meta.next - sum(child >= 0 for _, _, child in end.told[len(end.told) - len(end.fresh) :])
            self.journal.next_identity = lambda: first
            self.journal.commit_events(identity, end.fresh)
            self.journal.next_identity = lambda: self.meta.next
            counters = self.journal.counters_of(state.origins[state.spaces[identity].origin]["slot"])
            for message in end.fresh:
                counters.words[COUNTER_OF_EVENT[message[0]]] += 1
        self.meta = attrs.evolve(state.meta, awaits=-1)
        self.notes.kept = state.notes
        self.dispatcher.spin_us = self.meta.spin_us
        if self.meta.owner >= 0:
            self.own(self.meta.owner)
        for number, record in state.origins.items():
            if number not in used:  # its predecessor was about to let it go
                self.journal.append((Kind.RETIRED, number, b""))
                close_foreign((record["config"], *record["fds"]))
                continue
            self._restoring[number] = record
            told = [item for item in end.told if state.spaces.get(item[0]) in used[number]]
            origin = (built or {}).get(number)
            if origin is not None:
                origin.record = record
                self._restore_spaces(origin, told)
            else:
                self.spawn(self._restore_origin(number, record, told))

    async def _restore_origin(self, number: int, record: dict[str, Any], told: list[tuple[int, bytes, int]]) -> None:
        with or_end():
            self._restore_spaces(await self.rebuilt(number, record), told)

    async def rebuilt(self, number: int, record: dict[str, Any]) -> Origin:
        """Return what serves again."""
        return await rebuild(self.journal.counters_of(record["slot"]), number, record, self._commons)

    def _restore_spaces(self, origin: Origin, told: list[tuple[int, bytes, int]]) -> None:
        self._restoring.pop(origin.identity, None)
        self.origins[origin.identity] = origin
        states = [state for state in self.waiting.values() if state.origin == origin.identity]
        known = {state.identity: self._serve(state, origin) for state in states}
        for identity, message, child in told:
            space = known.get(identity)
            if space is not None and (child < 0 or child in known):
                space.backend.layout(space, message[0], message, known.get(child))
        for state in states:
            del self.waiting[state.identity]
            self.arrivals.done(state.token)
        self.files.served(known.values())
        for space in known.values():
            space.wake_all()


def _record_of(origin: int, record: dict[str, Any]) -> tuple[Kind, int, bytes]:
    return Kind.ORIGIN, origin, json.dumps(record).encode()


def _records_of(state: SpaceState) -> tuple[tuple[Kind, int, bytes], ...]:
    rows, _ = state.mappings.pack(0, len(state.mappings))
    return (Kind.SPACE, state.identity, state.content), (Kind.MAPPINGS, state.identity, rows)
