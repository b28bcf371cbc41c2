"""What serves each client: a source or a handler, made ready once for all clients that share it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.ahead.trace import Trace, fingerprint, stored
from aiouffd.engine.one_copy import OneCopy
from aiouffd.engine.options import Options, Service, checked
from aiouffd.engine.serve.handler import Handler, wants_writes
from aiouffd.errors import HandoffError, TraceError, UffdError
from aiouffd.handoff import firecracker
from aiouffd.handoff.json_lines import line
from aiouffd.handoff.own_threads import detach, in_own_thread
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.pager.client.packing import Pack
from aiouffd.server.clashes import CHOSEN, MAPPING, check, why_not
from aiouffd.server.recordings import recording_of
from aiouffd.server.residence import memory_of, notes_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import FileDescriptorLike

    from aiouffd.engine.ahead.pages import Recording
    from aiouffd.handoff.arrival import Handoff
    from aiouffd.handoff.nydus import Answers
    from aiouffd.handoff.receive import Peer
    from aiouffd.server.recordings import Recordings
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
    record: str | os.PathLike[str] | Recording | None = None
    replay: str | os.PathLike[str] | None = None
    handoff_timeout: float = 5.0
    nydus_answers: Answers = "length"

    def __attrs_post_init__(self) -> None:
        """Check what excludes each other."""
        check(self.given(recorded=self.record is not None))

    def given(self, *, recorded: bool) -> set[str]:
        """Return the names of what may exclude other things; recorded: touches are, from the beginning on or not."""
        limits, options = self.options.limits, self.options
        found = {
            "record": recorded or None,
            "replay": self.replay,
            "one_copy": options.one_copy or None,
            "max_resident": options.max_resident,
            "client_events": limits.client_events,
            "client_bytes": limits.client_bytes,
        }
        return {name for name, value in found.items() if value is not None}

    def keeping(self, recent: int, *, traces: bool) -> Settings:
        """Return the same of a server that keeps so many bytes of what was read last; traces: it is told of flights."""
        limits = attrs.evolve(self.options.limits, recent=recent)
        return attrs.evolve(self, options=attrs.evolve(self.options, limits=limits, traces=traces))


class Services:
    """Finds what serves a client, and shares it among the clients of the same source and page size.

    Args:
        origin: a source, a handler, or a function of (peer, number, name) that returns one. None: there is none before
            `serve`.
        settings: how it serves.
        recordings: are told of each source; None: nothing is recorded.
    """

    def __init__(self, origin: Any, settings: Settings, recordings: Recordings | None = None) -> None:
        self._fixed: Any = None
        self._choose: Callable[[Peer, int, str], Any] = _none_yet
        self._settings, self._options, self._replay = settings, settings.options, settings.replay
        self._recordings = recordings
        self._packs: dict[Any, Pack] = {}  # by source and page size, as long as a client is served from it
        self._uses: Counter[str] = Counter()  # clients, by the token of their pack
        self._lock = threading.Lock()  # over both
        self._hanging: Counter[str | Peer] = Counter()  # openings, by the name that was asked for, and by who asked
        self._memory: tuple[OwnedDescriptor, ...] = ()  # that all clients map: the notes, and the file
        self._greeting: tuple[bytes, OwnedDescriptor] | None = None
        if origin is not None:
            self.serve(origin)

    def serve(self, origin: Any) -> None:
        """Have this serve clients from now on. Raises ValueError: it cannot."""
        if wants_writes(origin):
            raise ValueError(f"{origin!r} wants to be told of writes, but clients register no write protection")
        if not hasattr(origin, "read"):
            check({*self._settings.given(recorded=False), CHOSEN})
        chooses = callable(origin) and not isinstance(origin, type | Handler) and not hasattr(origin, "read")
        self._fixed = None if chooses else checked(origin)
        self._choose = origin if chooses else lambda *_: origin

    def __str__(self) -> str:
        return "a source for each client" if self._fixed is None else repr(self._fixed)

    def check(self) -> None:
        """Check `replay` before a client comes, and make the file that all are to map. Blocks.

        Raises:
            OSError, TraceError: it cannot be used, or that be made.
        """
        if self._options.one_copy and self._fixed is not None and not self._memory:
            self._make_memory(self._options.one_copy)
        if self._replay is not None and not Path(self._replay).is_dir():
            Trace.load(self._replay, source=bytes(32) if self._fixed is None else fingerprint(self._fixed))

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
        peer, timeout, done = handoff.peer, self._options.limits.timeout, set[asyncio.Task[Pack]]()
        sharing = asyncio.get_running_loop().create_task(in_own_thread(self._share, origin, size, handoff))
        try:
            done = (await asyncio.wait([sharing], timeout=timeout))[0]
        finally:
            if not done:  # canceled, or the client holds the lock of its memory file
                self._hanging[peer] += 1
                sharing.add_done_callback(lambda sharing: self._shared_late(peer, sharing))
        if not done:
            raise HandoffError(str(peer), f"what it has handed over could not be looked at within {timeout:g} s")
        return sharing.result()

    async def origin(self, handoff: Handoff, number: int) -> Any:
        """Return the source for a client, which is the caller's alone. Canceling is safe; raises as `take`."""
        return (await self._open(handoff.peer, number, "", handoff))[0]

    async def size(self, peer: Peer, number: int) -> int:
        """Return how many bytes a client of this process would be served. Canceling is safe; raises as `take`."""
        size = (await self._open(peer, number, "", None))[1]
        if not size:
            raise HandoffError(str(peer), "asks for the size, which what serves it does not know")
        return size

    @property
    def unmappable(self) -> str:
        """Why no client may map files, as it is now; "": clients may."""
        records = self._recordings
        recorded = records is not None and (records.is_beginning or records.terms is not None)
        return why_not(self._settings.given(recorded=recorded), MAPPING)

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
                if self._recordings is not None:
                    self._recordings.uncover(pack)
                self._packs = {key: other for key, other in self._packs.items() if other is not pack}
                detach(pack.close)  # it may be the last to hold an open file

    def close(self) -> None:
        """Let the clients' file go: it is theirs."""
        for item in (*self._memory, *(self._greeting or ())[1:]):
            item.close()

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

    def _shared_late(self, peer: Peer, sharing: asyncio.Task[Pack]) -> None:
        self._hanging.subtract((peer,))
        self._hanging = +self._hanging
        if not sharing.cancelled() and sharing.exception() is None:
            self.release(sharing.result())

    def _share(self, origin: Any, size: int, handoff: Handoff) -> Pack:
        bounded = self._options.bounded
        file = [] if handoff.memory.closed else [memory_of(handoff, alone=bounded)]
        notes = [notes_for(handoff)] if bounded else []
        memory: list[FileDescriptorLike] = [*notes, *file] if file else []
        identity = getattr(origin, "identity", None)
        page_size = handoff.regions.page_size
        key = (id(origin) if identity is None else identity, page_size)
        with self._lock:
            if bounded and self._uses:
                raise HandoffError(str(handoff.peer), "cannot share max_resident: it is for one client at a time")
            pack = None if memory else self._packs.get(key)
            if pack is None:
                service = Service(origin, trace=self._trace(handoff, origin))
                common = () if memory or page_size != self._options.one_copy else self._memory
                options = attrs.evolve(self._options, one_copy=page_size if common else 0, foreign=bool(memory))
                pack = Pack(service, options, memory or common, page_size)
                if not memory:
                    self._packs[key] = pack
            self._uses[pack.token] += 1
        if self._recordings is not None:
            self._recordings.cover(pack, origin, size, page_size)
        return pack

    def _trace(self, handoff: Handoff, origin: Any) -> Trace | None:
        page_size = handoff.regions.page_size
        if self._replay is None:
            is_recorded = self._recordings is not None and self._recordings.terms is not None
            return None if is_recorded else stored(origin, page_size)
        try:
            source = fingerprint(origin)
            return Trace.replayed(recording_of(self._replay, source, page_size), page_size, origin, source)
        except (TraceError, OSError) as error:
            log.warning("%s: nothing is replayed: %s", handoff.peer, error)
            return None


def _none_yet(peer: Peer, *_: Any) -> Any:
    raise HandoffError(str(peer), "cannot be served: the source of its session is not open")
