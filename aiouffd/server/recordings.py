"""What a session records: which pages its clients touch, in a file for each source and page size.

The pager writes the file, through the descriptor in a note of its journal: so it goes on whoever is killed, and in a
server that takes over. It gets its name when the recording is stopped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from aiouffd.engine.ahead.keeping import keep_pages, save_with_pages
from aiouffd.engine.ahead.merging import Order, merged
from aiouffd.engine.ahead.pages import Recording, unkept, version_of
from aiouffd.engine.ahead.trace import Recorder, Trace, differ, fingerprint
from aiouffd.engine.serve.bounds import Limits
from aiouffd.errors import SessionError, TraceError, UffdError
from aiouffd.lifetime import uninterrupted
from aiouffd.pager.client.packing import copied
from aiouffd.pager.process.state import RECORDING
from aiouffd.server.clashes import check

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from concurrent.futures import Future

    from aiouffd.pager.client.client import PagerClient
    from aiouffd.pager.client.packing import Pack
    from aiouffd.server.successor import Left

__all__ = ["MOST", "Recorded", "Recordings", "Terms", "recording_of"]

log: logging.Logger = logging.getLogger("aiouffd.server")

MOST: Final = 16 << 30
"""Bytes of pages in one recording, if nothing else is said: a file of 32 MiB."""

_TERMS: Final = f"{RECORDING}of "  # notes of sessions that record are named so, and by the session
_PATIENCE: Final = 10.0  # seconds for the pager to let go of a recording


@attrs.frozen
class Terms:
    """How a session records.

    Attributes:
        path: of the file; or an existing directory, in which each source has a file that its bytes name.
        merge: how what is recorded is merged with a recording that is there; None: it takes its place.
        most: bytes of pages in one file, at most.
        pages: bytes of pages that a file carries, at most.
    """

    path: str
    merge: Order | None = None
    most: int = MOST
    pages: int = 0


@attrs.frozen
class Recorded:
    """A recording that is complete.

    Attributes:
        path: of its file.
        pages: that it has.
        touched: how many of them were touched; the others came along.
        carried: how many of them it carries the bytes of.
    """

    path: str
    pages: int
    touched: int
    carried: int = 0


@attrs.define(eq=False)
class _Open:
    """A recording that goes on; `copy` of its source, if the file is to carry bytes."""

    recorder: Recorder
    page_size: int
    size: int
    source: bytes
    copy: Any = None


def recording_of(path: str | os.PathLike[str], source: bytes, page_size: int) -> Path:
    """Return where the recording of a source is: at a path, or in a directory; source: its fingerprint."""
    place = Path(path)
    return place / f"{source[:12].hex()}-{page_size}.trace" if place.is_dir() else place


class Recordings:
    """The recordings of one session. Thread-safe.

    Args:
        pager: serves its clients.
        session: its name.
        given: what may exclude a recording: see `clashes`.
        tell: called with what happens, and its details.
        limits: of the reads of pages whose bytes a file is to carry.

    Attributes:
        terms: of what is recorded; None: nothing is.
        is_beginning: something is about to be.
        wanted: what the session was to record from its beginning on; None: nothing.
    """

    def __init__(
        self,
        pager: PagerClient,
        session: str,
        given: Collection[str] = (),
        tell: Callable[..., None] = lambda *_, **__: None,
        limits: Limits | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._tell = tell
        self._given = given
        # By token: what is served; no origin: a server before this one has made it.
        self._made: dict[str, tuple[Pack, Any, int, int]] = {}
        self.terms: Terms | None = None
        self.is_beginning: bool = False
        self.wanted: str | None = None
        self._pager = pager
        self._session = session
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}  # by path
        self._covered: dict[str, str] = {}  # paths, by the token of a pack
        self._letting_go: set[Future[Any]] = set()

    def prepare(self, record: str | os.PathLike[str] | Recording | None, left: Left | None) -> None:
        """Record to a path from now on, or to none; and go on with what a server before this one has left. Blocks.

        Raises:
            OSError: as `start`.
        """
        wanted = self.wanted = None if record is None else os.fspath(record)
        if left is not None and left.text:
            self._adopt(left)
            if left.text.get("record", wanted if self._session else None) == wanted:
                return  # what was asked for then goes on, or was stopped since
        if record is None or wanted is None:
            return
        if self.terms is None:
            self.start(Terms(wanted, pages=Recording.of(record).most))
            wait(self._record_all(), timeout=_PATIENCE)
        else:
            log.warning("touches are recorded to %s still, and not to %s: stop that first", self.terms.path, wanted)

    async def begin(self, terms: Terms) -> None:
        """As `start`, also what is served already."""
        self.is_beginning = True
        try:
            await uninterrupted(partial(self.start, terms))
        finally:
            self.is_beginning = False
        asked = [asyncio.wrap_future(future) for future in await asyncio.to_thread(self._record_all)]
        await asyncio.wait([asyncio.gather(*asked, return_exceptions=True)], timeout=_PATIENCE)
        self._tell("session.recording", path=terms.path)

    def start(self, terms: Terms) -> None:
        """Record what `cover` names from now on. Blocks.

        Raises:
            SessionError: it records already.
            ClashError: its settings exclude that.
            OSError: there can be no file at the path.
        """
        check({*self._given, "record"})
        if self.terms is not None:
            raise SessionError(self._session, f"records already, to {self.terms.path}: stop that first")
        place = Path(terms.path)
        Recorder.create(place / ".trace" if place.is_dir() else place, 0, 0).discard()
        self.terms = terms
        text = {**attrs.asdict(terms), "path": _absolute(terms.path), "session": self._session}
        self._pager.holding.keep(_TERMS + self._session, text)

    def cover(self, pack: Pack, origin: Any, size: int, page_size: int) -> None:
        """Record what is served from a pack, if that can be; else the log says why. Blocks.

        Args:
            pack: about to serve, or serving.
            origin: what it was made of.
            size: bytes of that.
            page_size: of the memory.
        """
        self._made[pack.token] = pack, origin, size, page_size
        self._record(pack, origin, size, page_size)

    def _record_all(self) -> list[Future[Any]]:
        asked = [self._record(*made) for made in list(self._made.values())]
        return [future for future in asked if future is not None]

    def _record(self, pack: Pack, origin: Any, size: int, page_size: int) -> Future[Any] | None:
        terms = self.terms
        if terms is None or pack.token in self._covered:
            return None
        if origin is None and (origin := _opened(pack)) is None:
            return None
        size, source = getattr(origin, "size", size), fingerprint(origin)  # a handler has no size
        path = str(recording_of(terms.path, source, page_size))
        with self._lock:
            if self.terms is not terms:  # stopped meanwhile
                return None
            try:
                known = self._open.get(path)
                if known is None:
                    created = Recorder.create(path, page_size, size, source)
                    known = self._open[path] = _Open(created, page_size, size, source)
                if (known.page_size, known.size) != (page_size, size) or differ(known.source, source):
                    log.warning("%r is not recorded: %s is of another source or page size", origin, path)
                    return None
                if terms.pages and known.copy is None:
                    known.copy = _copy_of(origin)
                text = {"most": terms.most, "session": self._session, "file": _absolute(path)}
                self._covered[pack.token] = path
                return self._pager.holding.keep(RECORDING + pack.token, text, [known.recorder.fileno()], pager=True)
            except (OSError, UffdError) as error:
                log.warning("%r is not recorded: %s", origin, error)
                return None

    def uncover(self, pack: Pack) -> None:
        """Nothing is served from a pack any more; what it is recorded in goes on."""
        self._made.pop(pack.token, None)
        if self._covered.pop(pack.token, None) is not None:
            self._let_go(pack.token)

    def _let_go(self, token: str) -> None:
        """Have the pager write no more of what is served from a pack."""
        future = self._pager.holding.forget(RECORDING + token)
        if future is not None:
            self._letting_go.add(future)
            future.add_done_callback(self._letting_go.discard)

    def _adopt(self, left: Left) -> None:
        for client, _ in left.clients:
            self._made[client.tenant.pack.token] = client.tenant.pack, None, client.end, client.tenant.page_size
        for note in left.recordings:
            if not note.fds:
                most, pages = note.text["most"], note.text.get("pages", 0)  # a server before this one knew no pages
                self.terms = Terms(note.text["path"], note.text["merge"], most, pages)
                continue
            path = note.text["file"]
            self._covered[note.name.removeprefix(RECORDING)] = path
            if path not in self._open:
                recorder = Recorder(note.fds[0], Path(path))
                self._open[path] = _Open(recorder, *recorder.about)
        for token, path in self._covered.items() if self.terms is not None and self.terms.pages else ():
            if token in self._made and self._open[path].copy is None:
                self._open[path].copy = _copy_of(_opened(self._made[token][0]))

    async def stop(self) -> list[Recorded]:
        """Complete what is recorded, if anything is. Canceling is safe: nothing is recorded then, and no file appears.

        Raises:
            OSError: a file cannot be written; the others are complete.
            SessionError: the pager does not let go of them; they are lost.
        """
        terms, self.terms = self.terms, None
        if terms is None:
            return []
        self._pager.holding.forget(_TERMS + self._session)
        with self._lock:
            recordings, self._open = self._open, {}
            covered, self._covered = self._covered, {}
        for token in covered:
            self._let_go(token)
        waiting = [asyncio.wrap_future(future) for future in list(self._letting_go)]
        answered = asyncio.gather(*waiting, return_exceptions=True)  # where the pager has died, nobody writes
        if not (await asyncio.wait([answered], timeout=_PATIENCE))[0]:
            for recording in recordings.values():  # and not completed: it may be written to
                recording.recorder.discard()
            raise SessionError(self._session, "has lost its recording: the pager does not answer")
        done = await asyncio.to_thread(_complete, recordings, terms, self._limits)
        for recorded in done:
            log.info("%s: pages recorded: %d, touched: %d, with their bytes: %d", *attrs.astuple(recorded))
            self._tell("session.recorded", **attrs.asdict(recorded))
        return done


def _opened(pack: Pack) -> Any:
    """Return the source or handler of a server before this one; None: it cannot be had."""
    try:
        return pack.opened().origin
    except Exception as error:  # noqa: BLE001 - of code of the user's own
        log.warning("what a server before this one has served is not recorded: %s", error)
        return None


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - links are followed when it is used


def _copy_of(origin: Any) -> Any:
    """Return a copy of a source, to read pages of when its recording is complete; None: they cannot be carried."""
    if any(version_of(origin)):
        return copied(origin)
    log.warning("%s", unkept(origin))
    return None


def _complete(recordings: dict[str, _Open], terms: Terms, limits: Limits) -> list[Recorded]:
    done, problem = list[Recorded](), None
    for path, recording in recordings.items():
        try:
            done.append(_completed(path, recording, terms, limits))
        except OSError as error:
            problem = error
    if problem is not None:
        raise problem
    return done


def _completed(path: str, recording: _Open, terms: Terms, limits: Limits) -> Recorded:
    before = _known(path) if terms.merge is not None else None
    recording.recorder.complete()
    trace, known = Trace.load(path), [] if before is None else [before]
    if before is not None and terms.merge is not None:
        try:
            trace = merged([("the one before", before), (path, trace)], terms.merge, most=terms.most)
            save_with_pages(trace, path, known, 0 if recording.copy else MOST)
        except TraceError as error:
            log.warning("the recording takes the place of the one before: %s", error)
    if recording.copy is not None:
        try:
            keep_pages(path, recording.copy, terms.pages, limits, known)
        except (UffdError, OSError) as error:
            log.warning("%s: it carries no bytes of its pages: %s", path, error)
    trace = Trace.load(path)
    carried = 0 if trace.pages is None else len(trace.pages.offsets)
    return Recorded(path, len(trace.offsets), len(trace.offsets) - len(trace.along), carried)


def _known(path: str) -> Trace | None:
    try:
        return Trace.load(path)
    except FileNotFoundError:
        return None
    except TraceError as error:
        log.warning("%s", error)
        return None
