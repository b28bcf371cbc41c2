"""What a journal amounts to: its snapshot, with the events since then applied. Pure data, no descriptor is touched.

The numbers of descriptors in old records cannot be trusted: when a space is closed its number is free, and may be
that of another space, forked later. So nothing is served, registered or closed while events are being replayed; only
what is there at the end of them is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.kernel import abi
from aiouffd.pager.process.journal import CLOSED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.pager.process.journal import Journal

__all__ = ["Replay", "numbers", "replay", "survey"]


@attrs.frozen
class Replay:
    """What is served at the end of a journal.

    Attributes:
        state: as in a snapshot; its spaces are those that are served now.
        told: of each event, in order: the space, the message, and the identity of the forked child (-1: none).
    """

    state: dict[str, Any]
    told: list[tuple[int, bytes, int]]


def replay(state: dict[str, Any], events: Iterable[tuple[int, bytes]]) -> Replay:
    """Apply events to a state, as the worker that has read them did."""
    spaces: dict[int, dict[str, Any]] = {item["id"]: dict(item) for item in state["spaces"]}
    shown = {identity: Mappings(Mapping(*each) for each in item["mappings"]) for identity, item in spaces.items()}
    following = state["next"]
    told: list[tuple[int, bytes, int]] = []
    for identity, message in events:
        if identity not in spaces:
            continue
        code = message[0]
        if code == CLOSED:
            del spaces[identity], shown[identity]
            continue
        child = -1
        if code == abi.EVENT_FORK:
            (fd,) = abi.FORK_MESSAGE.unpack(message)
            child, following = following, following + 1
            of_child = {"id": child, "fd": fd, "tether": -1, "child": True, "ahead": (0, 0)}
            spaces[child] = spaces[identity] | of_child
            shown[child] = shown[identity].copy()
        else:
            spaces[identity]["changed"] = True
            _apply(shown[identity], message)
        told.append((identity, message, child))
    for identity, item in spaces.items():
        item["mappings"] = [attrs.astuple(mapping) for mapping in shown[identity]]
    return Replay(state | {"next": following, "spaces": list(spaces.values())}, told)


def _apply(mappings: Mappings, message: bytes) -> None:
    code = message[0]
    if code == abi.EVENT_REMAP:
        mappings.remap(*abi.REMAP_MESSAGE.unpack(message))
    elif code == abi.EVENT_REMOVE:
        mappings.remove(*abi.RANGE_MESSAGE.unpack(message))
    elif code == abi.EVENT_UNMAP:
        mappings.unmap(*abi.RANGE_MESSAGE.unpack(message))


def survey(journal: Journal) -> dict[str, Any] | None:
    """Return the state that a journal amounts to; None where nothing has been served yet."""
    state, events = journal.load()
    return replay(state, events).state if state is not None else None


def numbers(state: dict[str, Any]) -> set[int]:
    """Return the descriptors that a state speaks of."""
    known = {fd for space in state["spaces"] for fd in (space["fd"], space["tether"]) if fd >= 0}
    for origin in state["origins"].values():
        known.update((origin["config"], *origin["fds"]))
    known.update(fd for fd in (state["owner"], state["awaits"]) if fd >= 0)
    return known
