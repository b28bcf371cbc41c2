"""The worker: the event loop that serves. What it must not lose is in the journal before it acts on it."""

from __future__ import annotations

import array
import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

from aiouffd.engine.ahead.fill import bring_ahead, bring_early, complete
from aiouffd.engine.assembly import make_readahead
from aiouffd.engine.dispatcher import Dispatcher
from aiouffd.engine.loops import new_event_loop
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.messages import COUNTER_OF_EVENT
from aiouffd.engine.serve.handler import Handler
from aiouffd.engine.space import Space
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, PagerStartError, SourceError, UffdError, encode_error
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.memory import unshare_memory
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.pager.process import control
from aiouffd.pager.process.handles import open_pidfd
from aiouffd.pager.process.inherited import INTERRUPT_BLOCKED_LOOP, SAY_WHAT_BLOCKS
from aiouffd.pager.process.replay import numbers, replay, survey
from aiouffd.pager.process.tenancy import Origin, Tenancy, build, config_of
from aiouffd.pager.process.travel import Pickles, is_pickle

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.engine.flight import Flight
    from aiouffd.pager.process.journal import Journal

__all__ = ["descriptors", "run"]

log = logging.getLogger("aiouffd.pager")

_HANDOVER_TIMEOUT = 10.0
_BUILD_TIMEOUT = 60.0  # of sources and handlers, which may import what they like
_FAREWELL = 0.5
_PREPARED = 256 << 20  # bytes of a source that are brought to hand before anybody asks
_PIECE = 4 << 20


def run(journal: Journal, connection: socket.socket, pickles: Pickles) -> None:
    """Serve until nobody is left to be served."""
    worker = _Worker(journal, connection, pickles)
    # The keeper asks for these when the loop does not turn. A handler of Python's runs also where time.sleep() blocks.
    signal.signal(SAY_WHAT_BLOCKS, worker.say_what_blocks)
    faulthandler.register(SAY_WHAT_BLOCKS, chain=True)
    signal.signal(INTERRUPT_BLOCKED_LOOP, worker.interrupt_what_blocks)
    gc.freeze()  # what the keeper made lives as long as the worker does
    # The loop is left as it is: to close it would be to wait for threads, and for tasks that do not let themselves be
    # canceled, and nobody is left who could wait for what they do.
    loop = new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(worker.main())


def descriptors(journal: Journal) -> set[int]:
    """Return the descriptors that a worker's journal speaks of."""
    state = survey(journal)
    return numbers(state) if state is not None else set()


class _Worker:
    def __init__(self, journal: Journal, connection: socket.socket, pickles: Pickles) -> None:
        self.journal = journal
        self.connection = connection
        self.pickles = pickles
        self.sender = control.Sender(connection)
        self.strangers = 0
        self.origins: dict[int, Origin] = {}
        self.tenancies: dict[int, Tenancy] = {}  # by space identity
        self.next_identity = 1
        self.tasks: set[asyncio.Task[None]] = set()
        self.owner = -1  # pidfd of the process that has started this pager
        self.prepared = False
        self.left = False  # it has closed the connection, or has ended
        self.done = asyncio.Event()
        self.outbox = control.Outbox(connection)
        self.takeover: asyncio.Task[None] | None = None
        self.dispatcher: Dispatcher

    async def main(self) -> None:
        loop = asyncio.get_running_loop()
        self.connection.setblocking(False)
        state, events = self.journal.load()
        self.journal.on_full = self.state
        for gauge in (Counter.IN_FLIGHT, Counter.BYTES_IN_FLIGHT):  # what a predecessor had under way is no more
            self.journal.counters.words[gauge] = 0
        self.dispatcher = Dispatcher(
            loop,
            self.journal.counters,
            spin_us=state["spin_us"] if state else 50,
            landing=self.journal,
            on_drop=self.dropped,
            on_idle=self.idle,
        )
        if state is not None and state["awaits"] >= 0:
            with socket.socket(fileno=state["awaits"]) as predecessor:
                if await self.left_to_us(predecessor, state):
                    self.restore(state, events, self.journal.fresh)
        elif state is not None:
            self.restore(state, events, self.journal.fresh)
        loop.add_reader(self.connection.fileno(), self.requests)
        pidfd = open_pidfd(os.getpid())  # a number alone might be another process's by the time that it is used
        self.send({"event": "ready", "pid": os.getpid()}, [pidfd])
        await self.done.wait()
        for origin in list(self.origins.values()):
            self.retire(origin)
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=_FAREWELL)

    # State

    def state(self) -> dict[str, Any]:
        """Return all that a successor needs."""
        return {
            "next": self.next_identity,
            "owner": self.owner,
            "awaits": -1,
            "spin_us": self.dispatcher.spin_us,
            "origins": {str(origin.identity): origin.record for origin in self.origins.values()},
            "spaces": [
                {
                    "id": space.identity,
                    "fd": fd,
                    "page_size": space.page_size,
                    "features": int(space.uffd.features),
                    "origin": self.tenancies[space.identity].origin.identity,
                    "token": self.tenancies[space.identity].token,
                    "child": self.tenancies[space.identity].is_child,
                    "tether": self.tenancies[space.identity].tether,
                    "ahead": (space.replayed, space.filled),
                    "changed": space.mappings.generation != space.born,
                    "mappings": [(mapping.start, mapping.end, mapping.offset) for mapping in space.mappings],
                }
                for fd, space in self.dispatcher.spaces.items()
            ],
        }

    def restore(
        self,
        state: dict[str, Any],
        events: list[tuple[int, bytes]],
        fresh: int,
        built: dict[str, Origin] | None = None,
    ) -> None:
        """Take over from a predecessor: its state, the events since then, and the faults that it had read."""
        end = replay(state, events)
        state = end.state
        self.next_identity = state["next"]
        if state["owner"] >= 0:
            self.owned_by(state["owner"])
        used = {item["origin"] for item in state["spaces"]}
        for identity, record in state["origins"].items():
            if int(identity) in used:
                origin = (built or {}).get(identity) or build(self.journal.counters, int(identity), record)
                origin.record = record
                self.origins[int(identity)] = origin
        known = {item["id"]: self.serve(item, self.origins[item["origin"]]) for item in state["spaces"]}
        old = len(end.told) - fresh
        for index, (identity, message, child) in enumerate(end.told):
            space = known.get(identity)
            if index >= old:
                self.journal.counters.words[COUNTER_OF_EVENT[message[0]]] += 1
            if space is not None and (child < 0 or child in known):
                space.backend.layout(space, message[0], message, known.get(child))
        self.journal.save(self.state(), landed=True)
        for space in known.values():
            space.wake_all()

    def save(self) -> None:
        self.journal.save(self.state())

    def owned_by(self, pidfd: int) -> None:
        """Note when the owner ends: end-of-file does not tell, since its forked children hold the connection."""
        self.owner = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self.exited)

    def serve(self, item: dict[str, Any], origin: Origin) -> Space:
        options = origin.options
        space = Space(
            Userfaultfd.from_fd(item["fd"], Feature(item["features"])),
            Mappings(Mapping(*mapping) for mapping in item["mappings"]),
            page_size=item["page_size"],
            backend=origin.backend,
            counters=self.journal.counters,
            readahead=make_readahead(item["page_size"], options, local=origin.backend.local),
            identity=item["id"],
            write_protect=options.write_protect,
            on_error=self.error,
            on_child=self.forked,
        )
        space.replayed, space.filled = item["ahead"]
        if item.get("changed"):  # what was brought may have gone with its mapping: see `complete`
            space.born = -1
        tenancy = self.tenancies[space.identity] = Tenancy(
            origin, item["token"], item["tether"], is_child=item["child"]
        )
        self.dispatcher.add(space)
        if not tenancy.is_child:
            tenancy.ahead = asyncio.get_running_loop().create_task(
                bring_ahead(space, origin.backend, origin.service.trace, options.background, self.save)
            )
        return space

    def forked(self, parent: Space, child: Space) -> None:
        child.identity = self.next_identity
        self.next_identity += 1
        of_parent = self.tenancies[parent.identity]
        self.tenancies[child.identity] = Tenancy(of_parent.origin, of_parent.token, is_child=True)
        self.dispatcher.add(child)

    def dropped(self, space: Space) -> None:
        """Tell the successor before the descriptor's number can mean something else."""
        self.journal.closed(space.identity)
        tenancy = self.tenancies.pop(space.identity)
        if tenancy.ahead is not None:
            tenancy.ahead.cancel()
        if tenancy.early is not None:
            tenancy.early[0].cancel()
        if tenancy.tether >= 0:
            os.close(tenancy.tether)
        if tenancy.announced:
            self.send({"event": "gone", "token": tenancy.token})
        self.retire(tenancy.origin)

    def retire(self, origin: Origin) -> None:
        """Let go what serves nobody any more."""
        if any(tenancy.origin is origin for tenancy in self.tenancies.values()):
            return
        if self.origins.pop(origin.identity, None) is None:
            return
        self.save()  # a successor must not look for its descriptors
        close_all([origin.record["config"], *origin.record["fds"]])
        task = asyncio.get_running_loop().create_task(origin.backend.aclose())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def family_of(self, token: str) -> list[Space]:
        return [space for space in self.dispatcher.spaces.values() if self.tenancies[space.identity].token == token]

    def space_of(self, token: str) -> Space | None:
        return next((space for space in self.family_of(token) if not self.tenancies[space.identity].is_child), None)

    # Requests

    def requests(self) -> None:
        try:
            message, fds = control.receive(self.connection, self.sender)
        except BlockingIOError:
            return
        except control.StrangerError as error:
            self.strangers += 1
            if self.strangers == 1:
                log.warning("%s; more such messages are dropped without a word", error)
            return
        except ValueError as error:
            log.error("a message of the pager's owner cannot be understood and is dropped: %s", error)  # noqa: TRY400
            return
        except control.Closed:
            asyncio.get_running_loop().remove_reader(self.connection.fileno())
            self.left = True
            if not self.dispatcher.spaces:
                self.done.set()
            return
        except control.DescriptorsLostError as error:
            log.error("%s", error)  # noqa: TRY400 - no traceback helps here
            if "id" in error.message:
                self.send({"id": error.message["id"], "error": encode_error(PagerStartError(str(error)))})
            return
        task = asyncio.get_running_loop().create_task(self.answer(message, fds))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def answer(self, message: dict[str, Any], fds: list[int]) -> None:
        try:
            answer = await getattr(self, "do_" + message["op"])(message, fds)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to whoever asked
            self.send({"id": message["id"], "error": encode_error(error)})
        else:
            self.send({"id": message["id"], "ok": answer})

    async def do_open(self, message: dict[str, Any], fds: list[int]) -> None:
        """Begin to serve: descriptors are the owner's pidfd, the configuration, the service's, and the space's own."""
        if self.owner < 0:
            self.owned_by(fds[0])
        else:
            os.close(fds[0])
        fds = fds[1:]
        own = fds[len(fds) - message["own"] :]
        if self.space_of(message["token"]) is not None:  # sent again: a predecessor died before it could answer
            close_all(fds)
            return
        try:
            origin = self.origin_of(message["service"], fds[: len(fds) - len(own)])
        except BaseException:
            close_all(own)
            raise
        item: dict[str, Any] = {"id": self.next_identity, "fd": own[0], "tether": own[1] if len(own) > 1 else -1}
        item |= {"ahead": (0, 0), "child": False}
        self.next_identity += 1
        self.dispatcher.spin_us = (
            max(self.dispatcher.spin_us, origin.options.spin_us) if self.tenancies else (origin.options.spin_us)
        )
        space = self.serve(item | message["space"], origin)
        try:
            self.save()
        except MemoryError as error:  # what the others have is kept
            self.dispatcher.drop(space)
            raise PagerStartError(f"there is no room for {len(space.mappings)} more mappings: {error}") from error
        space.wake_all()

    async def do_prepare(self, message: dict[str, Any], fds: list[int]) -> None:
        """Make a source ready that will be asked for: its beginning, too, as far as that can be at hand.

        And this process: the first request and fault write to 280 pages that the keeper has, too, which takes 1 ms.
        """
        if not self.prepared:
            self.prepared = True
            unshare_memory()
        source = self.origin_of(message["service"], fds).service.origin
        self.save()
        expect = getattr(source, "expect", None)
        if expect is not None:
            for at in range(0, min(source.size, _PREPARED), _PIECE):
                expect(at, _PIECE)

    def origin_of(self, service: dict[str, Any], fds: list[int]) -> Origin:
        """Return what serves, made anew unless it is here already; the descriptors are taken either way."""
        for known in self.origins.values():
            if known.record["token"] == service["token"]:
                close_all(fds)
                return known
        record = {"config": fds[0], "fds": fds[1:], **service}
        try:
            self.check_pickles(record)
            origin = build(self.journal.counters, self.next_identity, record)
        except UffdError:
            close_all(fds)
            raise
        except Exception as error:
            close_all(fds)
            raise PagerStartError(f"the source or handler arrived, but could not be rebuilt: {error}") from error
        self.origins[origin.identity] = origin
        self.next_identity += 1
        return origin

    def check_pickles(self, record: dict[str, Any]) -> None:
        """Raise PagerStartError where a source or handler would have to be unpickled, and this pager does not do so."""
        if not is_pickle(config_of(record)) or self.pickles is Pickles.ALWAYS:
            return
        known = (origin.record for origin in self.origins.values())
        if self.pickles is Pickles.NEVER or any(is_pickle(config_of(other)) for other in known):
            raise PagerStartError("this pager takes no source or handler of the application's own (any more)")

    def asked(self, message: dict[str, Any]) -> tuple[Space, Tenancy]:
        space = self.space_of(message["token"])
        if space is None:
            raise ClosedError("it is served no longer")
        return space, self.tenancies[space.identity]

    async def do_prefetch(self, message: dict[str, Any], fds: list[int]) -> None:
        space, tenancy = self.asked(message)
        await tenancy.origin.backend.prefetch(space, message["offset"], message["length"])

    async def do_refuse(self, message: dict[str, Any], fds: list[int]) -> None:
        """Bring nothing more to a space, which its owner is about to settle: a touch is SIGBUS until `close`."""
        space, tenancy = self.asked(message)
        if tenancy.ahead is not None:
            tenancy.ahead.cancel()
        space.refuse()

    async def do_close(self, message: dict[str, Any], fds: list[int]) -> None:
        """Serve a space no longer; what threads wait for is poisoned, if asked. Its children stay."""
        space, tenancy = self.asked(message)
        tenancy.announced = False
        if message["poison"]:
            space.poison({page for flight in space.flights.values() for page in flight.wanted})
        self.dispatcher.drop(space)

    async def do_begin(self, message: dict[str, Any], fds: list[int]) -> None:
        """Begin to bring what a space misses, which is not registered yet, perhaps: a `release` will follow."""
        space, tenancy = self.asked(message)
        late = asyncio.Event()
        task = asyncio.get_running_loop().create_task(bring_early(space, tenancy.origin.backend, late))
        tenancy.early = (task, late)

    async def do_release(self, message: dict[str, Any], fds: list[int]) -> None:
        """Bring all that a space and its forked children miss, and give the memory back to them.

        What is refused is left to its owner, who is about to close it, and told as an error.
        """
        while family := [space for space in self.family_of(message["token"]) if not space.closing]:
            for space in family:
                tenancy = self.tenancies.get(space.identity)
                if tenancy is None:  # it has ended while another was filled
                    continue
                announced, tenancy.announced = tenancy.announced, False
                try:
                    if tenancy.early is not None:
                        tenancy.early[1].set()
                        await asyncio.wait([tenancy.early[0]])
                    await complete(space, tenancy.origin.backend)
                    space.unregister()
                    self.dispatcher.drop(space)
                except ClosedError:
                    if space.is_gone:  # else it would be found again, until that is noticed
                        self.dispatcher.drop(space)
                    elif space.identity in self.tenancies and not space.closing:
                        raise
                except BaseException:
                    tenancy.announced = announced  # it is served on, and its end is to be told
                    raise
        if self.space_of(message["token"]) is not None:
            raise ClosedError("its owner is about to leave, and settles what is missing")

    # Handing over: the keeper is dead, and another pair is to serve. One of the two workers reads messages, at any
    # moment; which one does not depend on an answer that may be lost: the successor serves when its predecessor is
    # gone, and a predecessor that goes on after all says so before it lets go of the socket.

    async def do_handover(self, message: dict[str, Any], fds: list[int]) -> None:
        """Give everything to the worker of another keeper, over the socket that came along; serve until it is ready."""
        with socket.socket(fileno=fds[0]) as successor, contextlib.suppress(control.Closed, OSError):
            successor.settimeout(_HANDOVER_TIMEOUT)
            self.hand(successor)  # what it has to build, and may have to import for
            await readable(successor, _BUILD_TIMEOUT)
            control.receive(successor)
            self.hand(successor)  # from here on nothing is read
            try:
                control.receive(successor)
            except (control.Closed, OSError):
                control.send(successor, {"keep": True})
            else:
                os._exit(0)
        log.warning("the successor has not taken over: serving on")

    def hand(self, successor: socket.socket) -> None:
        state = self.state()
        along = sorted(numbers(state))
        control.send(
            successor, {"state": state, "numbers": along, "counters": self.journal.counters.words.tolist()}, along
        )

    async def do_takeover(self, message: dict[str, Any], fds: list[int]) -> None:
        """Take everything over from a worker whose keeper is dead; `Closed` where that has died, too."""
        if self.takeover is None or self.takeover.done():
            if self.origins:  # a worker before this one has taken it over, and died
                close_all(fds)
                return
            self.takeover = asyncio.get_running_loop().create_task(self.take(fds[0]))
        else:  # sent again
            close_all(fds)
        await asyncio.shield(self.takeover)

    async def take(self, predecessor: int) -> None:
        received: list[int] = []
        with socket.socket(fileno=predecessor) as connection:
            connection.settimeout(_HANDOVER_TIMEOUT)
            try:
                await readable(connection, _BUILD_TIMEOUT)
                state, _ = taken(connection, received)
                built = {
                    identity: build(self.journal.counters, int(identity), record)
                    for identity, record in state["origins"].items()
                }
                close_all(received)
                received.clear()
                control.send(connection, {"built": True})
                await readable(connection, _HANDOVER_TIMEOUT)
                state, counters = taken(connection, received)
            except BaseException:
                close_all(received)
                raise
            # Durable before it is acknowledged: should this worker die now, the next one waits for the same end.
            self.journal.save(state | {"awaits": connection.fileno()})
            self.journal.counters.words[:] = counters
            with contextlib.suppress(control.Closed, OSError):
                control.send(connection, {"taken": True})
            if not await self.left_to_us(connection, state):
                raise ClosedError("the predecessor serves on")
            self.dispatcher.spin_us = state["spin_us"]
            self.restore(state, [], 0, built)

    async def left_to_us(self, predecessor: socket.socket, state: dict[str, Any]) -> bool:
        """Wait until the predecessor is gone; tell whether it is, and does not serve on instead."""
        while True:
            await readable(predecessor, None)
            try:
                message, _ = control.receive(predecessor)
            except control.Closed:
                return True
            if message.get("keep"):
                self.save()
                close_all(numbers(state))
                return False

    # What blocks the loop

    def blocked(self) -> tuple[Any, Flight] | None:
        """Return the source or handler that runs just now, and what it was given."""
        task = asyncio.current_task()
        for space in self.dispatcher.spaces.values() if task is not None else ():
            for flight in space.flights.values():
                if flight.done is task:
                    return self.tenancies[space.identity].origin.service.origin, flight
        return None

    def say_what_blocks(self, *_: object) -> None:
        """Signal handler."""
        if (found := self.blocked()) is not None:
            log.error("%r blocks the event loop; it was given %r", *found)

    def interrupt_what_blocks(self, *_: object) -> None:
        """Signal handler: raises where the source or handler is, so that its page fails, and no other."""
        if (found := self.blocked()) is not None:
            origin, flight = found
            reason = "it has blocked the event loop, and was interrupted"
            if isinstance(origin, Handler):
                raise RuntimeError(reason)
            raise SourceError(repr(origin), flight.offset, flight.end - flight.start, reason)

    # What happens

    def idle(self) -> None:
        if self.left:
            self.done.set()

    def exited(self) -> None:
        """The owner is gone; its forked children, or others that it had served, may live on."""
        asyncio.get_running_loop().remove_reader(self.owner)
        self.left = True
        for space in list(self.dispatcher.spaces.values()):
            if space.uffd.gone():
                space.gone()
                self.dispatcher.drop(space)
        if not self.dispatcher.spaces:
            self.done.set()

    def error(self, space: Space, error: UffdError) -> None:
        log.error("%s", error)
        tenancy = self.tenancies.get(space.identity)
        if tenancy is None:  # it has been dropped meanwhile
            return
        message = {"event": "error", "token": tenancy.token, "error": encode_error(error)}
        self.send(message, may_be_lost=True)  # a storm of them, while nobody reads, is told by its beginning

    def send(self, message: dict[str, Any], fds: list[int] | None = None, *, may_be_lost: bool = False) -> None:
        """Tell the client; what it does not read now is kept. The descriptors are taken."""
        try:
            self.outbox.put(message, fds, may_be_lost=may_be_lost)
        except (control.Closed, OSError) as error:
            log.debug("nobody is there to be told: %s", error)
        if self.outbox:
            asyncio.get_running_loop().add_writer(self.connection.fileno(), self.flush)
        elif fds:
            close_all(fds)

    def flush(self) -> None:
        try:
            self.outbox.flush()
        except (control.Closed, OSError) as error:
            log.debug("nobody is there to be told: %s", error)
        if not self.outbox:
            asyncio.get_running_loop().remove_writer(self.connection.fileno())


async def readable(connection: socket.socket, seconds: float | None) -> None:
    """Wait until something can be received; TimeoutError (an OSError) after `seconds`."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(connection.fileno(), event.set)
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    finally:
        loop.remove_reader(connection.fileno())


def taken(connection: socket.socket, received: list[int]) -> tuple[dict[str, Any], memoryview]:
    """Receive a state; its descriptors are added to `received`, and it speaks of them by their numbers here."""
    message, fds = control.receive(connection)
    received += fds
    number_of = dict(zip(message["numbers"], fds, strict=True))
    state = message["state"]
    state["owner"] = number_of.get(state["owner"], -1)
    for record in state["origins"].values():
        record.update(config=number_of[record["config"]], fds=[number_of[fd] for fd in record["fds"]])
    for item in state["spaces"]:
        item["fd"] = number_of[item["fd"]]
        item["tether"] = number_of.get(item["tether"], -1)
    return state, memoryview(array.array("Q", message["counters"]))


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that are not needed."""
    for fd in fds:
        os.close(fd)
