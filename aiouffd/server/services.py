"""What serves each client: a source or a handler, made ready once for all clients that share it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.ahead.trace import Recorder, Trace, fingerprint, stored
from aiouffd.engine.one_copy import OneCopy
from aiouffd.engine.options import Options, Service, checked
from aiouffd.engine.serve.handler import Handler, wants_writes
from aiouffd.errors import HandoffError, TraceError, UffdError
from aiouffd.handoff import firecracker
from aiouffd.handoff.json_lines import line
from aiouffd.handoff.own_threads import detach, in_own_thread
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.pager.client.packing import Pack
from aiouffd.server.residence import notes_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import FileDescriptorLike

    from aiouffd.handoff.arrival import Handoff
    from aiouffd.handoff.nydus import Answers
    from aiouffd.handoff.receive import Peer
    from aiouffd.server.rejection import Policy

__all__ = ["Services", "Settings"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_MAX_HANGING = 8  # openings of one name that hang at once: each has a thread
_MAX_HANGING_OF_PROCESS = 32  # and of one process, whatever it asks for


@attrs.frozen
class Settings:
    """How a session takes clients, and serves them; `Server` says what each means."""

    uids: frozenset[int] = frozenset()
    on_reject: Policy = "poison"
    on_failure: Policy = "poison"
    options: Options = attrs.field(factory=Options)
    record: str | os.PathLike[str] | None = None
    replay: str | os.PathLike[str] | None = None
    handoff_timeout: float = 5.0
    nydus_answers: Answers = "length"

    def __attrs_post_init__(self) -> None:
        """Check what excludes each other."""
        if self.record is not None and self.replay is not None:
            raise ValueError("give either record or replay: a recording does not see pages that a replay brings")

    @property
    def unmappable(self) -> str:
        """Why no client may map files; "": clients may."""
        limits = self.options.limits
        bounds = limits.client_events, limits.client_bytes, self.options.max_resident
        if any(bound is not None for bound in bounds):
            return "clients are limited here, and what is mapped is not counted"
        return "touches are recorded here, and those of what is mapped are not seen" if self.record is not None else ""

    def keeping(self, recent: int, *, traces: bool) -> Settings:
        """Return the same of a server that keeps so many bytes of what was read last; traces: it is told of flights."""
        limits = attrs.evolve(self.options.limits, recent=recent)
        return attrs.evolve(self, options=attrs.evolve(self.options, limits=limits, traces=traces))


class Services:
    """Finds what serves a client, and shares it among the clients of the same source and page size.

    Args:
        origin: a source, a handler, or a function of (peer, number, name) that returns one.
        settings: how it serves.
    """

    def __init__(self, origin: Any, settings: Settings) -> None:
        if wants_writes(origin):
            raise ValueError(f"{origin!r} wants to be told of writes, but clients register no write protection")
        if settings.options.one_copy and not hasattr(origin, "read"):
            raise ValueError("one copy for all clients needs one source for all, and no handler")
        chooses = callable(origin) and not isinstance(origin, type | Handler) and not hasattr(origin, "read")
        self._fixed = None if chooses else checked(origin)
        self._choose: Callable[[Peer, int, str], Any] = origin if self._fixed is None else lambda *_: origin
        self._options, self._record, self._replay = settings.options, settings.record, settings.replay
        self._packs: dict[Any, Pack] = {}  # by source and page size, as long as a client is served from it
        self._uses: Counter[str] = Counter()  # clients, by the token of their pack
        self._lock = threading.Lock()  # over both
        self._hanging: Counter[str | Peer] = Counter()  # openings, by the name that was asked for, and by who asked
        self._recorder: Recorder | None = None
        self._recorded: Any = None  # source and page size
        self._memory: tuple[OwnedDescriptor, ...] = ()  # that all clients map: the notes, and the file
        self._greeting: tuple[bytes, OwnedDescriptor] | None = None

    def __str__(self) -> str:
        return "a source for each client" if self._fixed is None else repr(self._fixed)

    def check(self) -> None:
        """Check `record` and `replay` before a client comes, and make the file that all are to map. Blocks.

        Raises:
            OSError, TraceError: one of them cannot be used, or be made.
        """
        if self._options.one_copy:
            self._make_memory(self._options.one_copy)
        if self._replay is not None:
            Trace.load(self._replay, source=bytes(32) if self._fixed is None else fingerprint(self._fixed))
        if self._record is not None:
            Recorder.create(self._record, 0, 0).discard()

    @property
    def greeting(self) -> tuple[bytes, int] | None:
        """What each client is sent first, and a descriptor; None: nothing."""
        return None if self._greeting is None else (self._greeting[0], self._greeting[1].fileno())

    def _make_memory(self, page: int) -> None:
        assert self._fixed is not None
        self._memory = OneCopy.create(self._fixed.size, page)
        file = self._memory[-1].fileno()
        shown = OwnedDescriptor(os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC))
        self._greeting = line({"memory": {"size": os.fstat(file).st_size, "page_size": page}}), shown

    async def take(self, handoff: Handoff, number: int, name: str) -> Pack:
        """Return what serves a client; `release` it. Canceling is safe.

        Args:
            handoff: of the client.
            number: the client's.
            name: of the source that it asks for.

        Raises:
            HandoffError, SourceError, OSError: it cannot be served; the reason is for the client, too.
        """
        origin, size = await self._open(handoff.peer, number, name, handoff)
        return await asyncio.to_thread(self._share, origin, size, handoff)

    async def origin(self, handoff: Handoff, number: int) -> Any:
        """Return the source for a client, which is the caller's alone. Canceling is safe; raises as `take`."""
        return (await self._open(handoff.peer, number, "", handoff))[0]

    async def size(self, peer: Peer, number: int) -> int:
        """Return how many bytes a client of this process would be served. Canceling is safe; raises as `take`."""
        size = (await self._open(peer, number, "", None))[1]
        if not size:
            raise HandoffError(str(peer), "asks for the size, which what serves it does not know")
        return size

    def adopt(self, pack: Pack) -> None:
        """Count a client that is served from a pack of a server before this one; `release` it."""
        with self._lock:
            self._uses[pack.token] += 1

    def release(self, pack: Pack) -> None:
        """Let a pack go; it is closed with its last client."""
        with self._lock:
            self._uses[pack.token] -= 1
            if not self._uses[pack.token]:
                del self._uses[pack.token]
                self._packs = {key: other for key, other in self._packs.items() if other is not pack}
                detach(pack.close)  # it may be the last to hold an open file

    def complete(self) -> None:
        """Complete the recording, if there is one, and let the clients' file go. Blocks."""
        for item in (*self._memory, *(self._greeting or ())[1:]):
            item.close()
        if self._recorder is not None:
            self._recorder.complete()

    async def _open(self, peer: Peer, number: int, name: str, handoff: Handoff | None) -> tuple[Any, int]:
        """Return what the client asks for, and its size. Opening it may hang: that costs this client only."""
        timeout = self._options.limits.timeout
        if self._hanging[name] >= _MAX_HANGING:
            raise HandoffError(str(peer), f"its source {name!r} does not answer: {_MAX_HANGING} openings of it hang")
        if self._hanging[peer] >= _MAX_HANGING_OF_PROCESS:
            raise HandoffError(str(peer), f"{_MAX_HANGING_OF_PROCESS} sources that it has asked for do not answer")
        opening = asyncio.get_running_loop().create_task(in_own_thread(self._find, peer, number, name, handoff))
        if not (await asyncio.wait([opening], timeout=timeout))[0]:
            self._hanging.update((name, peer))
            opening.add_done_callback(lambda opening: self._opened_late(name, peer, opening))
            raise HandoffError(str(peer), f"its source {name!r} could not be opened within {timeout:g} s")
        try:
            return opening.result()
        except (UffdError, OSError):
            raise
        except ValueError as error:
            raise HandoffError(str(peer), str(error)) from error
        except Exception as error:
            log.exception("the function that finds a client's source failed")
            raise HandoffError(str(peer), f"no source could be found for it: {error!r}") from error

    def _find(self, peer: Peer, number: int, name: str, handoff: Handoff | None) -> tuple[Any, int]:
        """Return what the client asks for, and its size; a handler has that of the memory. In a thread of its own."""
        if name and self._fixed is not None:
            raise HandoffError(str(peer), f"asks for the source {name!r:.100}: this server has one, without a name")
        origin = checked(self._choose(peer, number, name))
        if isinstance(origin, Handler):
            return origin, 0 if handoff is None else handoff.regions.end
        if handoff is not None:
            firecracker.check_size(handoff.regions, origin.size, handoff.nydus.window if handoff.nydus else 0)
        return origin, origin.size

    def _opened_late(self, name: str, peer: Peer, opening: asyncio.Task[Any]) -> None:
        self._hanging.subtract((name, peer))
        self._hanging = +self._hanging  # without those of which none hangs any more
        if not opening.cancelled() and opening.exception() is not None:
            log.warning("the source %r could not be opened: %s", name, opening.exception())

    def _share(self, origin: Any, size: int, handoff: Handoff) -> Pack:
        bounded = self._options.bounded
        notes = [notes_for(handoff)] if bounded else []
        memory: list[FileDescriptorLike] = [] if handoff.memory.closed else [*notes, handoff.memory]
        identity = getattr(origin, "identity", None)
        key = (id(origin) if identity is None else identity, handoff.regions.page_size)
        alone = bool(memory) and self._record is None  # there is one recording for all
        with self._lock:
            if bounded and self._uses:
                raise HandoffError(str(handoff.peer), "cannot share max_resident: it is for one client at a time")
            pack = None if alone else self._packs.get(key)
            if pack is None:
                recorder = self._recording(key, handoff, origin, size)
                service = Service(origin, recorder, self._trace(handoff, origin))
                common = () if alone or handoff.regions.page_size != self._options.one_copy else self._memory
                options = attrs.evolve(self._options, one_copy=handoff.regions.page_size if common else 0)
                pack = Pack(service, options, memory if alone else common, handoff.regions.page_size)
                if not alone:
                    self._packs[key] = pack
            self._uses[pack.token] += 1
        return pack

    def _trace(self, handoff: Handoff, origin: Any) -> Trace | None:
        if self._replay is None:
            return None if self._record is not None else stored(origin, handoff.regions.page_size)
        try:
            return Trace.load(self._replay, handoff.regions.page_size, source=fingerprint(origin))
        except (TraceError, OSError) as error:
            log.warning("%s: nothing is replayed: %s", handoff.peer, error)
            return None

    def _recording(self, key: Any, handoff: Handoff, origin: Any, size: int) -> Recorder | None:
        if self._record is None:
            return None
        if self._recorder is None:
            page_size = handoff.regions.page_size
            self._recorder = Recorder.create(self._record, page_size, size, fingerprint(origin))
            self._recorded = key
        if self._recorded != key:
            raise HandoffError(str(handoff.peer), "a recording is of one source and one page size; this is another")
        return self._recorder
