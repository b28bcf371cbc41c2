"""What a journal amounts to: its records, one after the other. Pure data, no descriptor is touched.

The numbers of descriptors in old records cannot be trusted: when a space is closed its number is free, and may be
that of another space, forked later. So nothing is served, registered or closed while records are being replayed; only
what is there at the end of them is.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import attrs

from aiouffd.kernel import abi
from aiouffd.pager.process.state import Kind, Meta, Note, Record, SpaceState, State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.engine.mappings import Mappings
    from aiouffd.pager.process.journal import Content, Journal

__all__ = ["Replay", "last_meta", "replay", "survey"]


@attrs.define(eq=False, repr=False)
class Replay:
    """What is served at the end of a journal.

    Attributes:
        state: what is served now.
        told: of each layout event, in order: the space, the message, and the identity of the forked child (-1: none).
        fresh: the events at the end of `told` that landed, and were not committed.
    """

    state: State = attrs.field(factory=State)
    told: list[tuple[int, bytes, int]] = attrs.field(factory=list)
    fresh: list[bytes] = attrs.field(factory=list)

    def apply(self, record: Record) -> None:
        """Apply one record, as the worker did that has written it."""
        state, identity = self.state, record.identity
        match record.kind:
            case Kind.META:
                state.meta = Meta(**json.loads(record.content))
            case Kind.ORIGIN:
                state.origins[identity] = json.loads(record.content)
            case Kind.RETIRED:
                state.origins.pop(identity, None)
            case Kind.SPACE:
                state.spaces[identity] = SpaceState.decode(record.content)
            case Kind.CLOSED:
                state.spaces.pop(identity, None)
            case Kind.NOTE:
                note = Note(**json.loads(record.content))
                state.notes[note.name] = note
            case Kind.FORGOTTEN:
                state.notes.pop(record.content.decode(), None)
            case _ if identity in state.spaces:
                self._change(state.spaces[identity], record)
        state.meta.next = max(state.meta.next, identity + 1, record.child + 1)

    def _change(self, space: SpaceState, record: Record) -> None:
        if record.kind is Kind.MAPPINGS:
            space.mappings.unpack(record.content)
        elif record.kind is Kind.AHEAD:
            space.replayed, space.filled = struct.unpack("=qq", record.content)
        else:
            self.event(space, record.content, record.child)

    def event(self, space: SpaceState, message: bytes, child: int) -> None:
        """Apply a layout event."""
        if message[0] == abi.EVENT_FORK:
            (fd,) = abi.FORK_MESSAGE.unpack(message)
            self.state.spaces[child] = attrs.evolve(
                space,
                identity=child,
                fd=fd,
                tether=-1,
                is_child=True,
                replayed=0,
                filled=0,
                mappings=space.mappings.copy(),
            )
        else:
            if message[0] == abi.EVENT_REMOVE and space.file:
                start, end = abi.RANGE_MESSAGE.unpack(message)
                others = [each for each in self.state.spaces.values() if each.file == space.file]
                for each, low, high in space.mappings.alike(start, end, others):
                    each.mappings.remove(low, high)
                    each.changed = True
            space.changed = True
            _apply(space.mappings, message, shared=bool(space.file))
        self.told.append((space.identity, message, child))


def _apply(mappings: Mappings, message: bytes, *, shared: bool) -> None:
    code = message[0]
    if code == abi.EVENT_REMAP:
        mappings.remap(*abi.REMAP_MESSAGE.unpack(message), shared=shared)
    elif code == abi.EVENT_REMOVE:
        mappings.remove(*abi.RANGE_MESSAGE.unpack(message))
    elif code == abi.EVENT_UNMAP:
        mappings.unmapped(*abi.RANGE_MESSAGE.unpack(message))


def replay(content: Content) -> Replay:
    """Apply all records of a journal, and what has landed and was not committed."""
    end = Replay()
    for record in content.records:
        end.apply(record)
    space = end.state.spaces.get(content.identity)
    for message in content.landed if space is not None else ():
        child = end.state.meta.next if message[0] == abi.EVENT_FORK else -1
        end.event(space, message, child)  # type: ignore[arg-type]
        end.state.meta.next = max(end.state.meta.next, child + 1)
        end.fresh.append(message)
    return end


def survey(journal: Journal) -> State | None:
    """Return the state that a journal amounts to; None where nothing has been served yet."""
    content = journal.load()
    return replay(content).state if content.records else None


def last_meta(records: Iterable[Record]) -> Meta | None:
    """Return what is known besides spaces and origins, at little cost; None where nothing has been served yet."""
    found = None
    for record in records:
        if record.kind is Kind.META:
            found = record
    return Meta(**json.loads(found.content)) if found is not None else None
