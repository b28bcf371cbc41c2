"""What comes and goes as JSON. msgspec decodes, checks and describes these values, so each field is said once.

All that a request must not be is refused by name: an unknown field, a wrong type, a number out of its bounds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import attrs
import msgspec
from msgspec import Meta

from aiouffd.engine.one_copy import page_size_of
from aiouffd.engine.options import Options
from aiouffd.engine.serve.bounds import Limits
from aiouffd.server.recordings import MOST
from aiouffd.server.rejection import on_error_of
from aiouffd.server.restarts import restarts
from aiouffd.server.services import Settings
from aiouffd.store.live import Order
from aiouffd.store.place import is_snapshot, split

if TYPE_CHECKING:
    from aiouffd.server.clients import Client
    from aiouffd.server.mapped import MappedClient
    from aiouffd.server.server import Server
    from aiouffd.server.session import Session

__all__ = [
    "MEANT",
    "Attach",
    "Attached",
    "ClientView",
    "Completed",
    "Drain",
    "Evict",
    "Evicted",
    "NewSession",
    "NewSnapshot",
    "Owner",
    "Prefetch",
    "Problem",
    "Record",
    "ServerView",
    "SessionView",
    "SnapshotProgress",
    "Taken",
    "check_path",
    "decode",
]

_Value = TypeVar("_Value")
_Path = Annotated[str, Meta(min_length=1, max_length=4096)]
_Count = Annotated[int, Meta(ge=0, le=1 << 62)]
_User = Annotated[int, Meta(ge=0, lt=(1 << 32) - 1)]
_Rate = Annotated[float, Meta(gt=0)]
_NAMES = "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
_MODES = "^0?[0-7]{3}$"
MEANT: dict[str, str] = {
    _NAMES: "a name of at most 64 letters, digits, `_`, `.` and `-`, which begins with none of the last two",
    _MODES: "three octal digits, such as 660",
}
"""What is meant by a pattern of a field, in words."""
_Name = Annotated[str, Meta(pattern=_NAMES)]


@attrs.frozen
class Owner:
    """Who a socket's file is given to."""

    uid: _User
    gid: _User | None = None


@attrs.frozen(kw_only=True)
class NewSession:
    """A session to be created."""

    name: Annotated[_Name, Meta(description="Names the session.")]
    socket: Annotated[_Path, Meta(description="The socket for its clients: an absolute path, or one in the jail.")]
    source: Annotated[
        _Path | Annotated[list[_Path], Meta(min_length=1, max_length=4096)],
        Meta(description="A path or a URL; or several: a base, and sparse files over it, the lowest first."),
    ]
    jail: Annotated[_Path | None, Meta(description="A directory below which the socket is made.")] = None
    mode: Annotated[str, Meta(pattern=_MODES, description="Of the socket's file, in octal digits.")] = "600"
    owner: Annotated[Owner | None, Meta(description="Of the socket's file. This user may connect, too.")] = None
    allow_uids: Annotated[list[_User], Meta(max_length=1024, description="Further users that may connect.")] = (
        attrs.field(factory=list)
    )
    on_reject: Annotated[
        Literal["poison", "kill", "hold"], Meta(description="What becomes of a client that is turned away.")
    ] = "poison"
    on_failure: Annotated[
        Literal["poison", "kill", "hold"], Meta(description="What becomes of a client whose page cannot be had.")
    ] = "poison"
    readahead: Annotated[_Count, Meta(description="The largest window that one fault brings, in bytes.")] = 2 << 20
    spin_us: Annotated[int, Meta(ge=0, le=1_000_000, description="Microseconds to poll for further faults.")] = 50
    background: Annotated[
        Annotated[float, Meta(ge=0)] | Literal["max"],
        Meta(description="Bytes a second to fill without a fault; 0: none."),
    ] = 0.0
    record: Annotated[_Path | None, Meta(description="A file for the order of first touches, or a directory.")] = None
    replay: Annotated[_Path | None, Meta(description="What was recorded, whose pages each client gets.")] = None
    timeout: Annotated[_Rate, Meta(description="Seconds for opening the source, and for each read of it.")] = 30.0
    retries: Annotated[Annotated[int, Meta(ge=0)] | None, Meta(description="Further tries after a failed read.")] = None
    concurrent_reads: Annotated[int, Meta(ge=1, le=1 << 20, description="The most reads of the source at once.")] = 128
    bytes_in_flight: Annotated[int, Meta(ge=1 << 20, le=1 << 40, description="The most bytes of these reads.")] = (
        128 << 20
    )
    events_per_second: Annotated[
        _Rate | None, Meta(description="The most faults and layout events a second, of all its clients together.")
    ] = None
    bytes_per_second: Annotated[
        _Rate | None, Meta(description="The most bytes a second that are placed for all its clients together.")
    ] = None
    handoff_timeout: Annotated[_Rate, Meta(description="Seconds that a client has to send its handoff.")] = 5.0
    max_resident: Annotated[
        Annotated[int, Meta(ge=1 << 20, le=1 << 62)] | None,
        Meta(description="The most bytes that are there at once, of one client that hands over its memory file."),
    ] = None
    nydus_answers: Annotated[
        Literal["length", "bare"], Meta(description="What precedes each answer to a client of nydus.")
    ] = "length"
    one_copy: Annotated[
        Literal["small", "huge"] | None,
        Meta(description="Pages of the file of memory that clients are sent, to map it privately: one copy for all."),
    ] = None

    @property
    def sources(self) -> list[str]:
        """The base, and the layers over it."""
        return [self.source] if isinstance(self.source, str) else self.source

    def settings(self) -> Settings:
        """Return how the session takes and serves its clients; ValueError for what excludes each other."""
        limits = Limits(
            *(self.concurrent_reads, self.bytes_in_flight, self.timeout, self.retries),
            client_events=self.events_per_second,
            client_bytes=self.bytes_per_second,
        )
        background = math.inf if self.background == "max" else self.background
        options = Options(
            self.readahead,
            self.spin_us,
            background=background,
            limits=limits,
            on_error=on_error_of(self.on_failure),
            max_resident=self.max_resident,
            bounded=self.max_resident is not None,
            one_copy=page_size_of(self.one_copy),
        )
        uids = {*self.allow_uids} | ({self.owner.uid} if self.owner is not None else set())
        policies = self.on_reject, self.on_failure
        return Settings(
            frozenset(uids), *policies, options, self.record, self.replay, self.handoff_timeout, self.nydus_answers
        )


@attrs.frozen
class ClientView:
    """A process whose memory is served."""

    number: int
    pid: int
    uid: int
    bytes: int
    age: Annotated[float, Meta(description="Seconds since it was taken.")]
    memory_file: Annotated[bool, Meta(description="It has handed over the file behind its memory (a memfd).")]

    @classmethod
    def of(cls, client: Client | MappedClient, now: float) -> ClientView:
        """Return what is told of a client; now: on the monotonic clock."""
        age, has_memory = round(now - client.since, 3), client.has_memory
        return cls(client.number, client.peer.pid, client.peer.uid, client.length, age, has_memory)


@attrs.frozen
class SessionView:
    """A session, and what it has counted."""

    name: str
    state: Annotated[
        Literal["restoring", "listening", "draining"],
        Meta(
            description="restoring: new clients wait until what a server before this one had served from can be opened."
        ),
    ]
    clients: list[ClientView]
    rejected: int
    recording: Annotated[str | None, Meta(description="Where it records first touches; missing: it does not.")]
    settings: Annotated[NewSession | None, Meta(description="As it was created; missing: by the command line.")]
    source: Annotated[str, Meta(description="What brings the pages, for people.")]
    slow: Annotated[
        dict[str, Any], Meta(description="The last fault that took long, as in events, and its `time`; empty: none.")
    ]
    statistics: Annotated[dict[str, int], Meta(description="What was counted: aiouffd.Statistics.")]

    @classmethod
    def of(cls, session: Session, created: NewSession | None, now: float) -> SessionView:
        """Return what is told of a session."""
        clients = [ClientView.of(client, now) for client in (*session.clients.values(), *session.mapped)]
        about = (session.source, session.slow, session.told())
        recording = None if session.recordings.terms is None else session.recordings.terms.path
        return cls(session.name, session.state, clients, session.rejected, recording, created, *about)


@attrs.frozen
class ServerView:
    """The server."""

    version: str
    pid: int
    pager: Annotated[list[int], Meta(description="Its keeper and its worker.")]
    sessions: int
    clients: int
    rejected: int
    restarts: Annotated[list[str], Meta(description="What may be restarted: sentences for people.")]
    statistics: dict[str, int]

    @classmethod
    def of(cls, server: Server, version: str, pid: int) -> ServerView:
        """Return what is told of the server."""
        counts = (len(server.sessions), server.served, server.rejected)
        return cls(version, pid, list(server.pids), *counts, restarts(server), server.told())


@attrs.frozen
class Prefetch:
    """A range of the source to be brought to each client of a session."""

    offset: Annotated[_Count, Meta(description="In bytes.")] = 0
    length: Annotated[_Count, Meta(description="In bytes; what is behind the end is left out.")] = 1 << 62


@attrs.frozen
class Evict:
    """A range of the source of which is dropped what was not written."""

    offset: Annotated[_Count, Meta(description="In bytes.")] = 0
    length: Annotated[_Count, Meta(description="In bytes; what is behind the end is left out.")] = 1 << 62


@attrs.frozen
class Evicted:
    """What was dropped."""

    bytes: Annotated[int, Meta(description="That were there, and are missing now.")]


@attrs.frozen
class Record:
    """What a session is to record."""

    path: Annotated[_Path, Meta(description="A file, or an existing directory: a file for each source.")]
    merge: Annotated[
        Literal["union", "frequency", "last"] | None,
        Meta(description="How it is merged with a recording that is there; missing: in its place."),
    ] = None
    most: Annotated[int, Meta(ge=4096, le=1 << 40, description="The most bytes of pages in one file.")] = MOST
    pages: Annotated[int, Meta(ge=0, le=1 << 40, description="The most bytes of pages that one file carries.")] = 0


@attrs.frozen
class Attach:
    """A recording that is to be kept with the snapshot that a session serves."""

    path: Annotated[_Path, Meta(description="The file of the recording.")]
    by: Annotated[
        Literal["union", "frequency", "last", "replace"],
        Meta(description="How it is merged with the recording that the snapshot has; or in its place."),
    ] = "union"
    most: Annotated[int, Meta(ge=4096, le=1 << 40, description="The most bytes of pages.")] = MOST


@attrs.frozen
class Attached:
    """What has come of it."""

    snapshot: Annotated[str, Meta(description="What the session serves.")]
    bytes: Annotated[int, Meta(description="Of the recording that the snapshot has now.")]


@attrs.frozen
class Drain:
    """How a session is drained."""

    wait: Annotated[float, Meta(ge=0, le=86400, description="Seconds to wait, at most, for clients to leave.")] = 0.0


@attrs.frozen
class Completed:
    """What has become of the clients of a session that was completed."""

    failed: Annotated[dict[str, str], Meta(description="Number of a client that stays served: why.")]
    clients: Annotated[int, Meta(description="That are served still.")]


@attrs.frozen(kw_only=True)
class NewSnapshot:
    """A snapshot of the memory of a client, as it is at one moment while the client runs."""

    destination: Annotated[
        _Path, Meta(description="An absolute path or a URL that ends with .snap; or a path of a plain file.")
    ]
    base: Annotated[
        _Path | None,
        Meta(description="A snapshot in the same store. By default what the session serves, if it is one there."),
    ] = None
    whole: Annotated[bool, Meta(description="Of no base.")] = False
    client: Annotated[int | None, Meta(description="Its number; needed where there are several.")] = None
    rate: Annotated[_Rate | None, Meta(description="Bytes a second that are read at most.")] = None
    codec: Literal["zstd", "lz4", "none"] = "zstd"
    level: Annotated[int, Meta(ge=-7, le=22, description="Of zstd.")] = 3
    replace: Annotated[bool, Meta(description="Whether a snapshot of that name may be replaced.")] = False
    metadata: Annotated[dict[str, Any] | None, Meta(description="Any JSON, which is kept with it.")] = None

    def order(self, served: list[str]) -> Order:
        """Return what is to be written; ValueError for what excludes each other.

        Args:
            served: the sources of the session.
        """
        for field, path in (("destination", self.destination), ("base", self.base)):
            if path is not None and "://" not in path:
                check_path(field, path)
        base = self.base
        if base is None and len(served) == 1 and is_snapshot(served[0]) and is_snapshot(self.destination):
            base = served[0] if split(served[0])[0] == split(self.destination)[0] else None
        if self.whole:
            if self.base is not None:
                raise ValueError("a snapshot of a base is not whole - at `$.whole`")
            base = None
        options = {"codec": self.codec, "level": self.level, "replace": self.replace, "metadata": self.metadata}
        order = Order(self.destination, base, [], 0, self.rate, options)
        if not order.is_file:
            return order
        if base is not None or self.metadata is not None or "://" in self.destination:
            raise ValueError("a plain file has no base and no metadata, and no URL: name it .snap - at `$.destination`")
        return attrs.evolve(order, options={})


@attrs.frozen
class SnapshotProgress:
    """How far a snapshot is."""

    client: int
    destination: str
    captured: Annotated[bool, Meta(description="Its moment has been: what is written now is not in it.")]
    bytes: Annotated[int, Meta(description="That are read.")]
    total: Annotated[int, Meta(description="That are to be read, or some more.")]
    seconds: Annotated[float, Meta(description="Since it was asked for.")]


@attrs.frozen
class Taken:
    """A snapshot that was written."""

    client: int
    destination: str
    base: str | None
    pause_ns: Annotated[int, Meta(description="Nanoseconds for which writes were held back, the longest of them.")]
    bytes: Annotated[int, Meta(description="That were read, of memory and of the source.")]
    pages_saved: Annotated[int, Meta(description="That were written before they were read: their bytes were kept.")]
    changed: Annotated[float, Meta(description="Which part of the image was read, from 0 to 1.")]
    seconds: float


@attrs.frozen
class Problem:
    """Why a request was refused (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: Annotated[str, Meta(description="What is wrong, and with what.")]
    advice: Annotated[str, Meta(description="What to do.")] = ""
    field: Annotated[str, Meta(description="The field of the request that it is about: $.owner.uid")] = ""


def check_path(field: str, path: str) -> None:
    """Refuse a relative path: it would be relative to where the server was started."""
    if not path.startswith("/"):
        raise ValueError(f"{path!r} is no absolute path - at `$.{field}`")
    if "\0" in path:
        raise ValueError(f"{path!r} has a NUL - at `$.{field}`")


def decode(data: bytes, kind: type[_Value]) -> _Value:
    """Return a request's body.

    Raises:
        msgspec.DecodeError: it is no JSON, or (msgspec.ValidationError) it is not what it should be; it says where.
    """
    value: _Value = msgspec.json.decode(data, type=kind)
    _refuse_unknown(msgspec.json.decode(data), value, "$")
    return value


def _refuse_unknown(raw: Any, value: Any, place: str) -> None:
    """Refuse fields that msgspec passes over: what an operator has misspelled would be as if it had not been said."""
    known = {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
    for name, its in raw.items():
        if name not in known:
            raise msgspec.ValidationError(f"Object contains unknown field `{name}` - at `{place}`")
        if attrs.has(type(known[name])):
            _refuse_unknown(its, known[name], f"{place}.{name}")
