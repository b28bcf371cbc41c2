"""What a pager can be asked for. Each method is one operation, and is given the request and its descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import attrs

from aiouffd.engine.ahead.fill import bring_early, complete, prefetch
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.errors import ClosedError, PagerDiedError, PagerStartError, SourceError
from aiouffd.handoff.own_threads import close_foreign, in_own_thread
from aiouffd.kernel.memory import ProcessMemory, unshare_memory
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.pager.process.handles import close_all
from aiouffd.pager.process.journal import Whose
from aiouffd.pager.process.serialization import Pickles, config_of, is_pickle
from aiouffd.pager.process.served import PROVISIONAL, Served
from aiouffd.pager.process.state import RECORDING, Note, SpaceState
from aiouffd.pager.process.tenancy import RELEASE, FailedSource

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiouffd.engine.space import Space
    from aiouffd.pager.process.handover import Handover
    from aiouffd.pager.process.tenancy import Origin, Tenancy
    from aiouffd.sources.base import Source
    from aiouffd.store.live import Snapshots

__all__ = ["Answers"]

_PREPARED = 256 << 20  # bytes of a source that are brought to hand before anybody asks
_PIECE = 4 << 20
_DROPPED = 64 << 20  # bytes in one turn of the loop
_REPLAYS = "aiouffd.engine.ahead.trace", "aiouffd.sources.object_store"
_SWITCH = 0.0002  # seconds, of 0.005: threads that compute let the loop have its turn soon


async def _pong(_: dict[str, Any], fds: list[int]) -> None:
    """Answer: the loop turns."""
    close_all(fds)


class Answers:
    """The operations.

    Args:
        served: what is served.
        handover: to and from other workers.
        pickles: how often a source or handler is unpickled.
    """

    def __init__(self, served: Served, handover: Handover, pickles: Pickles) -> None:
        self._served = served
        self._handover = handover
        self._pickles = pickles
        self._prepared = False
        self._snapshots: Snapshots | None = None
        # By the token of the source, which is opened once; as long as somebody opens it.
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._operations: dict[str, Callable[[dict[str, Any], list[int]], Awaitable[Any]]] = {
            "open": self._open,
            "resume": self._resume,
            "complete": self._complete,
            "ping": _pong,
            "prepare": self._prepare,
            "expect": self._expect,
            "prefetch": self._prefetch,
            "evict": self._evict,
            "flush": self._flush,
            "snapshot": self._snapshot,
            "cancel_snapshot": self._cancel_snapshot,
            "snapshot_progress": self._snapshot_progress,
            "refuse": self._refuse,
            "give_up": self._give_up,
            "close": self._close,
            "begin": self._begin,
            "release": self._release,
            "protected": self._protected,
            "keep": self._keep,
            "forget": self._forget,
            "go": self._go,
            "lifeline": self._lifeline,
            "handover": lambda _, fds: self._handover.give(*fds),
            "takeover": lambda _, fds: self._handover.take(*fds),
        }

    async def answer(self, message: dict[str, Any], fds: list[int]) -> Any:
        """Do what a request asks for, and return its answer; what it raises is one, too. The descriptors are taken."""
        return await self._operations[message["op"]](message, fds)

    async def _open(self, message: dict[str, Any], fds: list[int]) -> None:
        """Begin to serve: descriptors are the owner's pidfd, the configuration, the service's, and the space's own."""
        if self._served.meta.owner < 0:
            self._served.own(fds[0])
        else:
            close_all(fds[:1])
        fds = fds[1:]
        own = fds[len(fds) - message["own"] :]
        service = {"config": fds[0], "fds": fds[1 : len(fds) - len(own)], **message["service"]}
        token = message["token"]
        if self._is_served(token):  # sent again: a predecessor died before it could answer
            close_all(fds)
            return
        if message.get("again"):
            self._check_pickles(service, own)
            self._served.open_again(service, lambda number: self._state(message["space"], own, number))
            await self._served.arrivals.wait(token)
            return
        lock = self._opening.setdefault(service["token"], asyncio.Lock())
        self._served.arrivals.expect(token)
        try:
            async with lock:
                try:
                    origin = await self._origin_of(service, message["counts"])
                except BaseException:
                    close_foreign(own)
                    raise
                space = self._served.open(self._state(message["space"], own, origin.identity), origin)
        finally:
            self._served.arrivals.done(token)
        space.wake_all()

    def _is_served(self, token: str) -> bool:
        return token in self._served.arrivals or self._served.find(token) is not None

    def _state(self, space: dict[str, Any], own: list[int], origin: int) -> SpaceState:
        return SpaceState(
            self._served.take_identity(),
            own[0],
            space["page_size"],
            space["features"],
            origin,
            space["token"],
            own[1] if len(own) > 1 else -1,
            is_child="/" in space["token"],
            own=space["own"],
            payer=space.get("payer", ""),
            file=space.get("file", ""),
            mappings=Mappings((Mapping(*mapping) for mapping in space["mappings"]), space.get("left", ())),
        )

    async def _origin_of(self, service: dict[str, Any], counts: list[int] | None) -> Origin:
        self._check_pickles(service)
        return await self._served.open_origin(service, counts)

    def _check_pickles(self, service: dict[str, Any], own: Sequence[int] = ()) -> None:
        """Refuse a source or handler that would have to be unpickled, where this pager does not do so.

        Raises:
            PagerStartError: the descriptors are closed, and a space's own.
        """
        if not is_pickle(config_of(service)) or self._pickles is Pickles.ALWAYS:
            return
        known = self._served.state().origins.values()
        if any(record["token"] == service["token"] for record in known):
            return
        if self._pickles is Pickles.NEVER or any(is_pickle(config_of(record)) for record in known):
            close_all((service["config"], *service["fds"], *own))
            raise PagerStartError("this pager takes no source or handler of the application's own (any more)")

    async def _resume(self, message: dict[str, Any], _: list[int]) -> None:
        """Go on where a pager before this one has stopped: counters, and files of which several spaces will come."""
        self._served.files.await_more(*message.get("files", ()))
        self._served.journal.resume(message["counters"], message.get("slots", ()))

    async def _complete(self, message: dict[str, Any], _: list[int]) -> None:
        """Of a file all spaces have been asked for: have them read. What is emptied counts for those that wait, too."""
        for token in message["tokens"]:
            if all(state.token != token for state in self._served.waiting.values()):
                await self._served.arrivals.wait(token)
        self._served.files.await_more(*(name for name in self._served.meta.files if name != message["name"]))

    async def _prepare(self, message: dict[str, Any], fds: list[int]) -> None:
        """Make a source ready that will be asked for: its beginning, too, as far as that can be at hand.

        And this process: the first request and fault write to 280 pages that the keeper has, too, which takes 1 ms.
        """
        if not self._prepared:
            self._prepared = True
            unshare_memory()
        source = (await self._origin_of({"config": fds[0], "fds": fds[1:], **message["service"]}, [])).service.origin
        expect = getattr(source, "expect", None)
        if expect is not None:
            for at in range(0, min(source.size, _PREPARED), _PIECE):
                expect(at, _PIECE)

    async def _expect(self, _message: dict[str, Any], _: list[int]) -> None:
        """Be ready to replay a recording: its owner waits for the server that has the object."""
        sys.setswitchinterval(_SWITCH)
        for module in _REPLAYS:
            await in_own_thread(import_module, module)

    async def _prefetch(self, message: dict[str, Any], _: list[int]) -> None:
        await prefetch((await self._served.wanted(message["token"]))[0], message["ranges"])

    async def _evict(self, message: dict[str, Any], _: list[int]) -> int:
        """Drop what was not written, of a space and its forked children; answer how many bytes."""
        space, tenancy = await self._served.wanted(message["token"])
        bound = tenancy.origin.backend.bound
        if bound is None:
            return 0
        dropped, at, step = 0, message["offset"], max(_DROPPED, bound.page)
        end = min(at + message["length"], len(bound.written))
        while at < end and not space.closing and not space.is_gone:
            upper = min(at - at % step + step, end)  # whole pages
            dropped += await bound.evict_all(at, upper)
            at = upper
            await asyncio.sleep(0)  # faults are served in between
        return dropped

    async def _flush(self, message: dict[str, Any], _: list[int]) -> None:
        """Write what was written to the source, and return when that is durable."""
        _space, tenancy = await self._served.wanted(message["token"])
        bound = tenancy.origin.backend.bound
        if bound is not None:
            await bound.flush(message["offset"], message["offset"] + message["length"])

    async def _snapshot(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Write what a space has at one moment.

        Descriptors are its memfd; or its memory and its pagemap, opened by its process; or none: a client's is known.
        """
        order, pagemap = message["order"], Pagemap.of(fds[1]) if fds[1:] else None
        memory = ProcessMemory(fds[0], None if pagemap is None else order["places"][0][0]) if fds else None
        with memory or contextlib.nullcontext(), pagemap or contextlib.nullcontext():
            if message["worker"] != os.getpid():  # sent again: nobody knows any more what was protected
                raise PagerDiedError("the pager's worker died while it took a snapshot: take another")
            live = await asyncio.to_thread(import_module, "aiouffd.store.live")
            if self._snapshots is None:  # asked behind the await: there is one for all
                self._snapshots = live.Snapshots()
                sys.setswitchinterval(_SWITCH)
            space, tenancy = await self._served.wanted(message["token"])
            others = [
                each for each in self._served.family_of(message["token"]) if pagemap is None and each is not space
            ]
            if not order["size"]:  # a client's memory file is as long as the source, whatever of it is shown
                order["size"] = max(_source_of(tenancy).size, *(end - start + at for start, end, at in order["places"]))
            modes = tenancy.origin.options.modes if tenancy.own else None
            memory = memory or ProcessMemory(os.dup(tenancy.origin.file))
            order = live.Order(**order)
            return attrs.asdict(await self._snapshots.take([space, *others], order, memory, pagemap, modes))

    async def _cancel_snapshot(self, message: dict[str, Any], _: list[int]) -> None:
        """Have the snapshot of a space end, which is answered when it has."""
        space = self._served.find(message["token"])
        if self._snapshots is not None and space is not None:
            self._snapshots.cancel(space)

    async def _snapshot_progress(self, message: dict[str, Any], _: list[int]) -> tuple[int, int] | None:
        """Tell how far the snapshot of a space is: bytes that are read, and of how many; None before its moment."""
        space, _tenancy = await self._served.wanted(message["token"])
        return None if self._snapshots is None else self._snapshots.progress(space)

    async def _refuse(self, message: dict[str, Any], _: list[int]) -> None:
        """Bring nothing more to a space, which its owner is about to settle: a touch is SIGBUS until `close`."""
        space, tenancy = await self._served.wanted(message["token"])
        if tenancy.ahead is not None:
            tenancy.ahead.cancel()
        space.refuse()

    async def _give_up(self, message: dict[str, Any], _: list[int]) -> None:
        """Have what fails there be SIGBUS, in a space and its children, and not asked for again."""
        for space in self._served.family_of(message["token"]):
            if space.retrying is not None:
                space.retrying.give_up(message["offset"], message["length"])

    async def _keep(self, message: dict[str, Any], fds: list[int]) -> None:
        """Keep a note for whoever owns these clients next."""
        self._served.notes.keep(Note(message["name"], message["text"], fds))
        self._record(message["name"])

    async def _forget(self, message: dict[str, Any], _: list[int]) -> None:
        """Keep a note no longer."""
        self._served.notes.forget(message["name"])
        self._record(message["name"])

    def _record(self, name: str) -> None:
        """Where a note was about a recording, have what is served be recorded so from now on."""
        for tenancy in list(self._served.tenancies.values()) if name.startswith(RECORDING) else ():
            if RECORDING + tenancy.origin.record["token"] == name:
                tenancy.record(self._served.notes)

    async def _go(self, _message: dict[str, Any], _: list[int]) -> None:
        """All is this pager's from now on, and it reads: who has served before has ended."""
        self._served.journal.provisional = False
        for space in self._served.dispatcher.held(PROVISIONAL):
            self._served.dispatcher.release(space, PROVISIONAL)
        gc.enable()

    async def _lifeline(self, _message: dict[str, Any], fds: list[int]) -> None:
        """Have a connection to another holder in place of the one to a holder that was killed: it ends in one step."""
        os.dup2(fds[0], self._served.journal.descriptor(Whose.LIFELINE), inheritable=False)
        os.close(fds[0])

    async def _protected(self, message: dict[str, Any], _: list[int]) -> None:
        """A page that could not be had is inaccessible now."""
        self._served.protection.done(message["start"])

    async def _close(self, message: dict[str, Any], _: list[int]) -> None:
        """Serve a space no longer; what threads wait for is poisoned, if asked. Its children stay.

        A file that was written is closed then, unless that takes long: another may ask for its lock.
        """
        space, tenancy = await self._served.wanted(message["token"])
        tenancy.announced = False
        if message["poison"]:
            space.poison({page for flight in space.flights for page in flight.wanted})
        origin = tenancy.origin
        self._served.dispatcher.drop(space)
        if not origin.options.write_back or origin.identity in self._served.origins:
            return
        gone = origin.gone
        del space, tenancy, origin  # it is closed with the last reference
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELEASE):
                await gone.wait()

    async def _begin(self, message: dict[str, Any], _: list[int]) -> None:
        """Begin to bring what a space misses, which is not registered yet, perhaps: a `release` will follow."""
        space, tenancy = await self._served.wanted(message["token"])
        late = asyncio.Event()
        task = asyncio.get_running_loop().create_task(bring_early(space, tenancy.origin.backend, late))
        tenancy.early = (task, late)

    async def _release(self, message: dict[str, Any], _: list[int]) -> None:
        """Bring all that a space and its forked children miss, and give the memory back to them.

        What is refused is left to its owner, who is about to close it, and reported as an error.
        """
        token = message["token"]
        if token in self._served.arrivals:
            await self._served.wanted(token)
        while family := [space for space in self._served.family_of(token) if not space.closing]:
            for space in family:
                await self._fill(space)
        if self._served.find(token) is not None:
            raise ClosedError("its owner is about to leave, and settles what is missing")

    async def _fill(self, space: Space) -> None:
        tenancies = self._served.tenancies
        tenancy = tenancies.get(space.identity)
        if tenancy is None:  # it has ended while another was filled
            return
        announced, tenancy.announced = tenancy.announced, False
        try:
            if tenancy.early is not None:
                tenancy.early[1].set()
                await asyncio.wait([tenancy.early[0]])
            await complete(space, tenancy.origin.backend)
            space.unregister()
            self._served.dispatcher.drop(space)
        except ClosedError:
            if space.is_gone:  # else it would be found again, until that is noticed
                self._served.dispatcher.drop(space)
            elif space.identity in tenancies and not space.closing:
                tenancy.announced = announced
                raise
        except BaseException:
            tenancy.announced = announced  # it is served on, and its end is to be told
            raise


def _source_of(tenancy: Tenancy) -> Source:
    """Return the source of a space. Raises SourceError where nobody can read what its missing pages show."""
    source = getattr(tenancy.origin.backend, "source", None)
    if source is None or isinstance(source, FailedSource):
        reason = "missing pages cannot be had without touching them: a snapshot needs a source"
        raise SourceError(repr(tenancy.origin.service.origin), 0, 0, reason)
    return cast("Source", source)
