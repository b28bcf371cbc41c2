"""Memory that a pager is given to serve."""

from __future__ import annotations

import itertools
import os
from collections import deque
from typing import TYPE_CHECKING, Any, Self

import attrs

from aiouffd.engine.mappings import Mappings
from aiouffd.engine.statistics import Counter
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.native.watchdog import Watch
from aiouffd.pager.client.packing import next_token
from aiouffd.pager.process.journal import SLOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiouffd.engine.mappings import Mapping
    from aiouffd.engine.statistics import Statistics
    from aiouffd.kernel.owned_descriptor import OwnedDescriptor
    from aiouffd.pager.client.packing import Pack
    from aiouffd.pager.process.journal import Journal
    from aiouffd.pager.process.state import SpaceState, State


__all__ = ["Slots", "Tenant", "root_of"]


def root_of(token: str) -> str:
    """Return the token of a tenant, or of the tenant whose forked child is reopened as "TOKEN/NAME"."""
    return token.partition("/")[0]


class Slots:
    """Numbers of counters (see `Journal`) for tenants that are counted by themselves. Thread-safe.

    Each is given anew as late as possible: what a tenant had under way may end behind it.
    """

    def __init__(self) -> None:
        self._next = deque(range(1, SLOTS))
        self._users: dict[int, int] = {}
        self._numbers = itertools.count(int.from_bytes(os.urandom(5)))  # no other process has the same ones

    def __bool__(self) -> bool:
        return bool(self._next)

    def take(self, journal: Journal) -> int:
        """Return one that nobody uses; 0, the pager's own, where there is none."""
        for _ in range(len(self._next)):
            try:
                slot = self._next.popleft()
            except IndexError:  # another thread was faster
                break
            if not journal.counters_of(slot).words[Counter.SPACES]:
                self._users[slot] = next(self._numbers)
                return slot
            self._next.append(slot)  # forked children of a tenant that has left are counted there
        return 0

    def user(self, slot: int) -> int:
        """Return a number of whoever has taken a slot; 0: a predecessor's had it."""
        return self._users.get(slot, 0)

    def reserve(self, slot: int) -> None:
        """Have one that is in use already: it was a predecessor's."""
        if slot in self._next:
            self._next.remove(slot)

    def give_back(self, slot: int) -> None:
        """Use it no longer."""
        if slot:
            self._next.append(slot)


def _mappings(shown: Iterable[Mapping]) -> Mappings:
    """Return them as they are given, with what was moved away, or made of what is shown."""
    return shown if isinstance(shown, Mappings) else Mappings(shown)


@attrs.define(eq=False, repr=False)
class Tenant:
    """Memory that a pager serves.

    Attributes:
        pack: what serves it.
        uffd: stays its owner's, and must stay open as long as the tenant: it is what makes touches wait, instead of
            reading zeros, while no pager is there.
        mappings: what it showed when it was opened.
        page_size: bytes.
        tether: a descriptor that the worker holds open as long as it serves the tenant; -1: none.
        slot: where the worker counts for it: see `Journal`.
        counts: where the counters in it begin, if nobody is counted there already.
        watch: over it, if it is memory of this process; the client's from now on.
        protect: called from the client's thread with start and length of a page that cannot be had, where the kernel
            has no UFFDIO_POISON: it makes the page inaccessible. None: it is memory of other processes.
        report: called from there with each error of its own, and when the pager is given up.
        lost: called from there when nobody serves it any more.
        flight: called from there with what is told of a flight of its own: see `Landings`; None: nobody wants that.
        restarts: how many workers had died before it came.
        leaving: its owner is about to settle it.
        silent: a last request was not answered: something blocks the worker's loop.
        payer: the name of those that share what they may have in a second.
        file: names the file of memory that it maps, among those that the pager serves; empty: none, or none is known.
        token: names it.
    """

    pack: Pack
    uffd: Userfaultfd
    mappings: Mappings = attrs.field(converter=_mappings)
    page_size: int
    tether: int = -1
    slot: int = 0
    counts: list[int] = attrs.field(factory=list)
    watch: Watch = attrs.field(factory=lambda: Watch(-1, None))
    protect: Callable[[int, int], None] | None = None
    report: Callable[[BaseException], None] = lambda _: None
    lost: Callable[[], None] = lambda: None
    flight: Callable[[dict[str, Any]], None] | None = None
    restarts: int = 0
    leaving: bool = False
    silent: bool = False
    payer: str = ""
    file: str = ""
    token: str = attrs.field(factory=next_token)

    @classmethod
    def left(cls, space: SpaceState, pack: Pack, state: State, **further: Any) -> Self:
        """Return what another process's pager has served, as its state says; the descriptors are taken.

        A forked child, as `children` returns them.
        """
        return cls(
            pack,
            Userfaultfd.from_fd(space.fd, Feature(space.features)),
            space.mappings,
            space.page_size,
            space.tether,
            state.origins[space.origin]["slot"],
            payer=space.payer,
            file=space.file,
            token=f"{space.token}/{space.identity}" if space.is_child else space.token,
            **further,
        )

    @property
    def fds(self) -> list[int]:
        """What goes along with a request that opens it."""
        return [self.uffd.fileno()] + ([self.tether] if self.tether >= 0 else [])

    @property
    def descriptors(self) -> tuple[OwnedDescriptor, ...]:
        """Those by which a program that closes all that it has is noticed."""
        return self.uffd, self.pack.config

    def record(self, mappings: Mappings) -> dict[str, Any]:
        """Return what a pager is told of the memory; `mappings`: what it shows now."""
        return {
            "token": self.token,
            "page_size": self.page_size,
            "features": int(self.uffd.features),
            "own": self.protect is not None,
            "payer": self.payer,
            "file": self.file,
            "mappings": [(mapping.start, mapping.end, mapping.offset) for mapping in mappings],
            "left": mappings.left,
        }

    def statistics(self, journal: Journal) -> Statistics:
        """Return what a pager with such a journal has counted for it."""
        restarts = journal.counters.words[Counter.RESTARTS] - self.restarts
        return attrs.evolve(journal.counters_of(self.slot).snapshot(), restarts=max(restarts, 0))

    def shown(self, state: State | None) -> Mappings:
        """Return what the memory shows, as the state of a pager says that is gone; None: as when it was opened."""
        for space in state.spaces.values() if state is not None else ():
            if space.token == self.token and not space.is_child:
                return space.mappings
        return self.mappings

    def children(self, state: State | None, fds: dict[int, int]) -> list[Tenant]:
        """Return its forked children, as such a state says, as tenants of a pager that is new.

        Args:
            state: as for `shown`.
            fds: by identity, of all children; those that are used are taken out. Each child owns its own.
        """
        return [
            attrs.evolve(
                self,
                uffd=Userfaultfd.from_fd(fds.pop(space.identity), self.uffd.features),
                mappings=space.mappings,
                tether=-1,
                protect=None,
                # Not by its identity: pagers give the same ones, and what the one before was asked for waits, perhaps.
                token=f"{self.token}/{next_token()}",
            )
            for space in (state.spaces.values() if state is not None else ())
            if space.is_child and space.identity in fds and root_of(space.token) == self.token
        ]
