"""What a worker must not lose, as data: what it serves, and from where. And the records of the journal that say it.

A journal is a sequence of records. Each is a header (length of the content, kind, identity, child) and a content of a
multiple of 8 bytes, so that numbers in it are aligned.
"""

from __future__ import annotations

import enum
import json
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import attrs

from aiouffd.engine.mappings import Mappings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "EVENT_SIZE",
    "LASTING",
    "RECORDING",
    "Kind",
    "Meta",
    "Note",
    "Record",
    "SpaceState",
    "State",
    "encode",
    "records",
]

RECORDING: Final = "recording "
"""Notes of recordings are named so, and by the token of what serves; their descriptor is that of a `Recorder`."""

LASTING: Final = "lasting"
"""In the text of a note that is of use without a client, too: nobody else knows of it."""
_HEADER: Final = struct.Struct("=IIqq")
EVENT_SIZE: Final = _HEADER.size + 32
"""Bytes of the record of a layout event."""


class Kind(enum.IntEnum):
    """What a record says; `identity` is that of a space, or of an origin."""

    META = 1  # JSON of a `Meta`, in place of the last
    ORIGIN = 2  # JSON: a source or handler is used from now on
    RETIRED = 3  # it is used no longer
    SPACE = 4  # JSON of a `SpaceState` without mappings: it is served from now on
    MAPPINGS = 5  # `Mappings.pack`: more of what the space shows
    EVENT = 6  # a layout event, as the kernel has told it; a fork's `child` is the identity of the child
    CLOSED = 7  # the space is served no longer
    AHEAD = 8  # two numbers: how much was replayed, and filled
    NOTE = 9  # JSON of a `Note`, in place of the last of its name
    FORGOTTEN = 10  # the name of a note that is kept no longer


class Record(NamedTuple):
    """One record."""

    kind: Kind
    identity: int
    child: int
    content: bytes


def encode(kind: Kind, identity: int = 0, content: bytes = b"", *, child: int = -1) -> bytes:
    """Return a record as it is in a journal."""
    return _HEADER.pack(len(content), kind, identity, child) + content + bytes(-len(content) % 8)


def records(data: memoryview) -> Iterator[Record]:
    """Yield the records in a journal's bytes."""
    at = 0
    while at < len(data):
        length, kind, identity, child = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        yield Record(Kind(kind), identity, child, bytes(data[at : at + length]))
        at += length + -length % 8


@attrs.define(repr=False)
class Meta:
    """What is known besides spaces and origins.

    Attributes:
        next: the lowest identity that was never given.
        owner: pidfd of the process that has started the pager; -1: not known yet.
        awaits: the connection to a predecessor that hands over; -1: there is none.
        spin_us: as `Options.spin_us`.
        files: of memory, of which the owner is about to have further spaces served, as `SpaceState.file` names them.
    """

    next: int = 1
    owner: int = -1
    awaits: int = -1
    spin_us: int = 50
    files: list[str] = attrs.field(factory=list)

    def encode(self) -> bytes:
        """Return the record."""
        return encode(Kind.META, 0, _json(attrs.asdict(self)))


@attrs.define
class Note:
    """What the pager's owner has kept for whoever owns these clients after it.

    Attributes:
        name: by which it is replaced and forgotten. One of a space's token is forgotten with the space.
        text: plain values, which the pager does not read, but for a recording's bound.
        fds: descriptors to hold open as long as it is kept.
    """

    name: str
    text: dict[str, Any]
    fds: list[int] = attrs.field(factory=list)

    @property
    def content(self) -> bytes:
        """As it is in a record."""
        return _json(attrs.asdict(self))


@attrs.define(eq=False, repr=False)
class SpaceState:
    """A space, as a successor needs it.

    Attributes:
        identity: names it.
        fd: its userfaultfd.
        page_size: in bytes.
        features: of the userfaultfd.
        origin: identity of what it is served from.
        token: by which it, or the ancestor that it was forked from, is asked for.
        tether: a descriptor to hold open as long as it is served; -1: none.
        is_child: of a fork.
        own: the process that has started the pager can make its pages inaccessible.
        replayed: how many entries of a recording were brought ahead.
        filled: up to which offset it was filled in the background.
        changed: its layout is another than when it was opened.
        payer: whose allowance it shares.
        file: names the file of its memory, which others may map, too; empty: it is private, or not known.
        mappings: what it shows.
    """

    identity: int
    fd: int
    page_size: int
    features: int
    origin: int
    token: str
    tether: int = -1
    is_child: bool = False
    own: bool = False
    replayed: int = 0
    filled: int = 0
    changed: bool = False
    payer: str = ""
    file: str = ""
    mappings: Mappings = attrs.field(factory=Mappings)

    @classmethod
    def decode(cls, content: bytes) -> Self:
        """Return what a record has, without what it shows: that follows."""
        values = json.loads(content)
        return cls(mappings=Mappings(left=values.pop("left", ())), **values)

    @property
    def content(self) -> bytes:
        """All but what it shows, as it is in a record; of the mappings what was moved away."""
        values = {field.name: getattr(self, field.name) for field in attrs.fields(SpaceState)}
        values["left"] = values.pop("mappings").left
        return _json(values)

    def encode(self) -> bytes:
        """Return the record, without what it shows."""
        return encode(Kind.SPACE, self.identity, self.content)

    def encode_all(self) -> bytes:
        """Return the record and that of the mappings."""
        rows, _ = self.mappings.pack(0, len(self.mappings))
        return self.encode() + encode(Kind.MAPPINGS, self.identity, rows)


@attrs.define(eq=False, repr=False)
class State:
    """All of it.

    Attributes:
        meta: what is known besides.
        origins: by identity: how each source or handler came here.
        spaces: by identity.
        notes: by name.
    """

    meta: Meta = attrs.field(factory=Meta)
    origins: dict[int, dict[str, Any]] = attrs.field(factory=dict)
    spaces: dict[int, SpaceState] = attrs.field(factory=dict)
    notes: dict[str, Note] = attrs.field(factory=dict)

    def encode(self) -> bytes:
        """Return the records of all of it."""
        return b"".join(
            (
                self.meta.encode(),
                *(encode(Kind.ORIGIN, identity, _json(record)) for identity, record in self.origins.items()),
                *(encode(Kind.NOTE, 0, note.content) for note in self.notes.values()),
                *(space.encode_all() for space in self.spaces.values()),
            )
        )

    @property
    def numbers(self) -> set[int]:
        """The descriptors that it speaks of."""
        known = {fd for space in self.spaces.values() for fd in (space.fd, space.tether)}
        known.update(fd for note in self.notes.values() for fd in note.fds)
        for origin in self.origins.values():
            known.update((origin["config"], *origin["fds"]))
        return {fd for fd in (*known, self.meta.owner, self.meta.awaits) if fd >= 0}

    def renumber(self, number_of: Mapping[int, int]) -> None:
        """Give the descriptors the numbers that they have in another process. What lacks one of its own is left out."""
        known = set(number_of)
        self.origins = {at: its for at, its in self.origins.items() if {its["config"], *its["fds"]} <= known}
        self.spaces = {
            at: space for at, space in self.spaces.items() if space.fd in known and space.origin in self.origins
        }
        self.notes = {name: note for name, note in self.notes.items() if known.issuperset(note.fds)}
        self.meta.owner = number_of.get(self.meta.owner, -1)
        for record in self.origins.values():
            record.update(config=number_of[record["config"]], fds=[number_of[fd] for fd in record["fds"]])
        for note in self.notes.values():
            note.fds = [number_of[fd] for fd in note.fds]
        for space in self.spaces.values():
            space.fd = number_of[space.fd]
            space.tether = number_of.get(space.tether, -1)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
