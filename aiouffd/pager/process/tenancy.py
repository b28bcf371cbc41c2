"""What a worker serves from, and what it knows of each space besides."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import weakref
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import attrs

from aiouffd.engine.assembly import make_backend, make_readahead
from aiouffd.engine.bound import Bound
from aiouffd.engine.flight import spawn
from aiouffd.engine.landing import Landings
from aiouffd.engine.one_copy import OneCopy
from aiouffd.engine.options import Options, Service
from aiouffd.engine.protect import WrittenPages
from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.common import Common, Shelf, is_far
from aiouffd.engine.serve.handler import Handler
from aiouffd.engine.serve.precedence import Precedence
from aiouffd.errors import PagerStartError, SourceError
from aiouffd.handoff.own_threads import close_foreign, in_own_thread
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.pager.process.handles import close_all, duplicates
from aiouffd.pager.process.serialization import PRIVATE, config_of, described, is_pickle, modules, unpack
from aiouffd.pager.process.state import SpaceState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiouffd.engine.readahead import Readahead
    from aiouffd.engine.serve.handler_backend import HandlerBackend
    from aiouffd.engine.serve.source import SourceBackend
    from aiouffd.engine.space import Space
    from aiouffd.engine.statistics import Counters
    from aiouffd.pager.process.notes import Notes

__all__ = [
    "BUILD_TIMEOUT",
    "RELEASE",
    "Arrivals",
    "Commons",
    "FailedSource",
    "Origin",
    "Tenancy",
    "build",
    "let_go",
    "make_origin",
    "options_of",
    "rebuild",
    "tell_flight",
]

log: logging.Logger = logging.getLogger("aiouffd.pager")

BUILD_TIMEOUT = 60.0
"""Seconds until a source must have been opened, or a handler rebuilt, which may import what it likes."""

RELEASE = 1.0
"""Seconds for a file that was written to be closed, when its memory is left."""

_MOST_FLIGHTS = 500  # that wait to be told; errors have room for more
_QUICK = 256 << 10  # bytes of a service that are looked at on the loop
_IN_MEMORY = {"aiouffd.engine.options", "aiouffd.sources.base", "aiouffd.sources.buffer"}
"""Modules whose classes open no file: to start a thread takes longer than to rebuild those."""


class Origin:
    """What serves some spaces: a service, and how it came here."""

    def __init__(
        self,
        counters: Counters,
        identity: int,
        record: dict[str, Any],
        service: Service,
        backend: SourceBackend | HandlerBackend,
    ) -> None:
        self.counters = counters
        self.identity = identity
        self.record = record
        self.service = service
        self.backend = backend
        self.options: Options = options_of(record)
        self.file: int = record["fds"][-1] if 0 < record["memory"] < PRIVATE else -1
        """The memfd that its memory maps, from its beginning on; -1: it is not known. It is the record's."""
        self.gone: asyncio.Event = asyncio.Event()
        """Set when a file that was written has been closed, for which `let_go` was called."""

    def readahead(self, page_size: int, notes: Notes) -> Readahead:
        """Return that of a space with such pages; it is recorded, if the service or a note says so."""
        recorder = self.service.recorder or notes.recorder(self.record["token"])
        return make_readahead(page_size, self.options, local=self.backend.local, recorder=recorder)


@attrs.define(eq=False, repr=False)
class Tenancy:
    """What the worker knows of a space besides.

    Attributes:
        origin: what serves it.
        token: by which it, or the ancestor that it was forked from, is asked for.
        tether: a descriptor to hold open as long as it is served; -1: none.
        ahead: the task that brings pages before they are touched.
        early: the task that begins to bring all of them before its process is ready; and when that is over.
        is_child: of a fork.
        own: as in `SpaceState`.
        announced: whether the client is told of its end.
        space: the space itself.
    """

    origin: Origin
    token: str
    tether: int = -1
    ahead: asyncio.Task[None] | None = None
    early: tuple[asyncio.Task[None], asyncio.Event] | None = None
    is_child: bool = False
    own: bool = False
    space: Space | None = None
    announced: bool = attrs.field(default=attrs.Factory(lambda self: not self.is_child, takes_self=True))

    def state(self, space: Space) -> SpaceState:
        """Return what a successor needs of its space; the mappings are not copied."""
        return SpaceState(
            space.identity,
            space.uffd.fileno(),
            space.page_size,
            int(space.uffd.features),
            self.origin.identity,
            self.token,
            self.tether,
            self.is_child,
            self.own,
            space.replayed,
            space.filled,
            space.mappings.generation != space.born,
            space.allowance.name if space.allowance is not None else "",
            space.file.name if space.file is not None else "",
            space.mappings,
        )

    def record(self, notes: Notes) -> None:
        """Have it recorded as the notes say now."""
        recorder, space = notes.recorder(self.origin.record["token"]), self.space
        if space is not None:
            space.close_fast_path()  # which is told when it is opened
            space.readahead.note = None if recorder is None else recorder.note
            space.readahead.note_pages = None if recorder is None else recorder.note_pages
            space.backend.opened(space)

    def end(self) -> None:
        """Bring nothing more, and close what was held open: the space is served no longer."""
        if self.ahead is not None:
            self.ahead.cancel()
        if self.early is not None:
            self.early[0].cancel()
        if self.tether >= 0:
            close_foreign([self.tether])


class Arrivals:
    """Spaces that are about to be served, by token: whoever wants one waits."""

    def __init__(self) -> None:
        self._expected: dict[str, list[asyncio.Event]] = {}

    def __contains__(self, token: str) -> bool:
        return token in self._expected

    def expect(self, token: str) -> None:
        """Have those wait who want it, until as many calls of `done`."""
        self._expected.setdefault(token, []).append(asyncio.Event())

    def done(self, token: str) -> None:
        """Let those go on: it is served, or is not going to be."""
        self._expected[token].pop().set()
        if not self._expected[token]:
            del self._expected[token]

    async def wait(self, token: str) -> None:
        """Wait until it is not expected any more."""
        while token in self._expected:
            await self._expected[token][0].wait()


def tell_flight(
    tenancies: Mapping[int, Tenancy], tell: Callable[..., bool], space: Space, told: dict[str, Any]
) -> bool:
    """Tell the client of a flight, unless its space was dropped meanwhile; False: there is no room for it."""
    tenancy = tenancies.get(space.identity)
    return tenancy is None or tell({"event": "flight", "token": tenancy.token, **told}, most=_MOST_FLIGHTS)


class Commons:
    """What the services of a worker have in common: sources, and whose turn it is.

    Sources that are far and the same are one, whoever serves from them. The same are those that were made in the same
    way, to be read with the same patience, and that say by their `identity` that their bytes are the same.

    Args:
        tell: called with a space, and what is told of a flight of it: see `Landings`. None: nobody is told.

    Attributes:
        tell: as given.
        precedence: among the backends.
    """

    def __init__(self, tell: Callable[[Space, dict[str, Any]], bool] | None = None) -> None:
        self.tell: Callable[[Space, dict[str, Any]], bool] | None = tell
        self.precedence: Precedence = Precedence()
        self._shelf = Shelf()
        self._known: WeakValueDictionary[Any, Common] = WeakValueDictionary()
        self._closing: set[asyncio.Task[None]] = set()

    def of(self, source: Any, made_of: str | None, limits: Limits) -> Common:
        """Return what has a source that was just opened, or one that is the same: then the new one is closed.

        Whoever gets it enters it before the loop turns.

        Args:
            source: no handler, and far.
            made_of: what `described` says of it.
            limits: of those who read it.
        """
        self._shelf.room = max(self._shelf.room, limits.recent)
        identity = getattr(source, "identity", None)
        if made_of is None or identity is None:
            return Common(source, self._shelf)
        key = (made_of, identity, limits.timeout, limits.retries)
        known = self._known.get(key)
        if known is None or not known.is_used:
            known = self._known[key] = Common(source, self._shelf)
        else:
            close = getattr(source, "aclose", None)
            if close is not None:
                spawn(self._closing, close())
        return known


class FailedSource:
    """In place of a source that could not be opened again: each of its pages fails, with the reason.

    Args:
        error: the reason.
    """

    size = (1 << 63) - 1
    retries = 0

    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def read(self, offset: int, length: int) -> bytes:
        """Raise SourceError."""
        raise SourceError(repr(self), offset, length, str(self._error)) from self._error

    def __repr__(self) -> str:
        return "a source that could not be opened again"


async def build(counters: Counters, identity: int, record: dict[str, Any], commons: Commons) -> Origin:
    """Rebuild a source or handler. The descriptors it gets are its own: those in the record outlive it.

    A source that is the same as another one of `commons` is that one.

    A source of ours may lie on a file system that does not answer, and is opened in a thread, unless it is in memory.
    What is pickled is rebuilt on the loop, which its code may ask for.

    Raises:
        PagerStartError: it takes too long.
        Exception: whatever the code of a pickle raises.
    """
    data = config_of(record)
    fds = duplicates(record["fds"][: len(record["fds"]) - record["memory"]])
    if is_pickle(data):
        for entry in record["path"]:
            if entry not in sys.path:
                sys.path.append(entry)
        service = unpack(data, fds)
    elif modules(data) <= _IN_MEMORY:
        service = unpack(data, fds)
    else:
        try:
            async with asyncio.timeout(BUILD_TIMEOUT):
                service = await in_own_thread(unpack, data, fds)
        except TimeoutError as error:
            raise PagerStartError(f"the source could not be opened in {BUILD_TIMEOUT:.0f} s") from error
    common = None
    if not isinstance(service.origin, Handler) and is_far(service.origin):
        made_of = described(data) if len(data) <= _QUICK else await in_own_thread(described, data)
        common = commons.of(service.origin, made_of, options_of(record).limits)
        service = attrs.evolve(service, origin=common.source)
    origin = make_origin(counters, identity, record, service, common, commons.precedence)
    if commons.tell is not None:
        origin.backend.on_landed = Landings(commons.tell, traces=origin.options.traces)
    return origin


async def rebuild(counters: Counters, identity: int, record: dict[str, Any], commons: Commons) -> Origin:
    """Do as `build` for what has served before: where it cannot be had now, each of its pages fails with the reason."""
    try:
        return await build(counters, identity, record, commons)
    except Exception as error:  # noqa: BLE001 - whatever the code of a pickle raises
        log.error("a source or handler could not be opened again: %s", error)  # noqa: TRY400 - the text says it
        return make_origin(counters, identity, record, Service(FailedSource(error)))


def make_origin(
    counters: Counters,
    identity: int,
    record: dict[str, Any],
    service: Service,
    common: Common | None = None,
    precedence: Precedence | None = None,
) -> Origin:
    """Return what serves from a source or handler; `common` and `precedence`: as for `make_backend`."""
    options = options_of(record)
    noted = record["fds"][-2:] if record["memory"] > 1 else None  # the notes, and the file that they are about
    bound = _bound(record, options, counters) if noted and not options.one_copy else None
    one_copy = OneCopy.of(noted, record["page_size"]) if noted and options.one_copy else None
    backend = make_backend(service, counters, options, bound, common, precedence, one_copy)
    return Origin(counters, identity, record, service, backend)


def _bound(record: dict[str, Any], options: Options, counters: Counters) -> Bound:
    """Return what drops pages. It is needed where a source cannot be opened, too: writes are noted there."""
    written, *memory = duplicates(record["fds"][-record["memory"] :])
    page = record["page_size"]
    how = (WrittenPages(written, page), page, options.max_resident, counters)
    if record["memory"] == PRIVATE:
        words, pagemap = memory
        return Bound(*how, owner=(words, pagemap))
    return Bound(*how, OwnedDescriptor(memory[0]), foreign=options.foreign, patience=options.limits.timeout)


def options_of(record: dict[str, Any]) -> Options:
    """Rebuild the options from JSON."""
    values = dict(record["options"])
    return Options(**{**values, "limits": Limits(**values["limits"])})


async def let_go(origin: Origin) -> None:
    """Close what serves nobody any more. Of a file that was written, wait until it is closed: then its lock is free."""
    fds, gone, backend = [origin.record["config"], *origin.record["fds"]], origin.gone, origin.backend
    if not origin.options.write_back:
        close_foreign(fds)  # a file's may wait for its file system
        await backend.aclose()
        return
    await backend.aclose()
    loop, collected = asyncio.get_running_loop(), asyncio.Event()
    source = weakref.ref(origin.service.origin, lambda _: loop.call_soon_threadsafe(collected.set))
    del origin, backend
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RELEASE):
            await in_own_thread(close_all, fds)
            if source() is not None:
                await collected.wait()
    gone.set()
