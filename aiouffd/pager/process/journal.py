"""What a worker knows, kept where its successor finds it: in memory that keeper, worker and application share.

A fault that was read and not resolved is no loss: WAKE brings it back. A layout event is: the kernel tells it once.
So messages land in this memory by the read itself, and a worker that dies right behind its read has left them here.

The content, in a memfd:

- one commit word. It names the active landing and the active snapshot, and counts the log's records. A single
  aligned 64-bit store changes all three at once, so that there is no moment in between for a kill to hit.
- two landings: where read(2) puts messages. Layout events are first copied to the log; then the other landing is
  cleared, and the commit word is stored, which makes that one the active one. What the active landing holds has
  therefore never been applied.
- the log: layout events in order, each with the space that it came from.
- two snapshots: the whole state as JSON. A new one is written to the inactive place, then committed with an empty
  log.
- the counters (`engine.statistics`).
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from aiouffd.engine.dispatcher import MESSAGES
from aiouffd.engine.statistics import SIZE as COUNTERS_SIZE
from aiouffd.engine.statistics import Counters
from aiouffd.kernel import abi
from aiouffd.pager.process.handles import explained, open_memfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.space import Space

__all__ = ["CLOSED", "Journal"]

_LANDING: Final = 4096
_LANDING_STRIDE: Final = 4096
_LANDING_MESSAGES: Final = 64  # behind the identity of the space that is being read
_COUNTERS: Final = 12288
_LOG: Final = 16384
_LOG_RECORDS: Final = 1600
_SNAPSHOT: Final = 1 << 20
_SNAPSHOT_STRIDE: Final = 64 << 20  # sparse: what is not written costs nothing
_SIZE: Final = _SNAPSHOT + 2 * _SNAPSHOT_STRIDE

_RECORD: Final = struct.Struct("=q32s")
_LAYOUT: Final = frozenset((abi.EVENT_FORK, abi.EVENT_REMAP, abi.EVENT_REMOVE, abi.EVENT_UNMAP))
CLOSED: Final = 0xFF
"""In place of an event code: the space is served no longer."""


class Journal:
    """The shared memory; one process writes it at a time.

    Args:
        fd: a memfd made by `create`. It stays the caller's, who may close it: the mapping keeps the memory.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._map.madvise(mmap.MADV_DONTDUMP)  # a core dump would write out its holes, too
        self._bytes = memoryview(self._map)
        self._words = self._bytes[:_LANDING].cast("Q")
        self._identities = [self._bytes[at : at + 8].cast("q") for at in map(_landing, (0, 1))]
        self._landings = [
            self._bytes[at + _LANDING_MESSAGES : at + _LANDING_MESSAGES + MESSAGES * abi.MESSAGE_SIZE]
            for at in map(_landing, (0, 1))
        ]
        self.counters = Counters(self._bytes[_COUNTERS : _COUNTERS + COUNTERS_SIZE])
        self.buffers = [self._landings[self._active]]
        self.on_full: Callable[[], Any] = dict
        """Returns the whole state, when the log must be begun anew."""

    @classmethod
    def create(cls) -> Journal:
        """Make an empty one."""
        fd = open_memfd("aiouffd-journal")
        try:
            os.ftruncate(fd, _SIZE)
            return cls(fd)
        except OSError as error:
            raise explained(f"no journal of {_SIZE >> 20} MiB", error) from error

    @property
    def _active(self) -> int:
        return self._words[0] & 1

    # Writing

    def reading(self, identity: int) -> None:
        """Say whose messages land next."""
        self._identities[self._active][0] = identity

    def commit(self, space: Space, layout: list[bytes]) -> None:
        """Append layout events to the log, and change the landing."""
        self._append(space.identity, layout)

    def closed(self, identity: int) -> None:
        """Note that a space is served no longer."""
        self._append(identity, [bytes([CLOSED]) + bytes(31)])

    def save(self, state: Any, *, landed: bool = False) -> None:
        """Replace snapshot and log by this state; `landed`: what the active landing holds is in it as well."""
        data = json.dumps(state, separators=(",", ":")).encode()
        word = self._words[0]
        other = ~(word >> 1) & 1
        at = _SNAPSHOT + other * _SNAPSHOT_STRIDE
        if len(data) > _SNAPSHOT_STRIDE - 8:
            raise MemoryError("the pager's state is larger than its journal")
        self._bytes[at + 8 : at + 8 + len(data)] = data
        self._bytes[at : at + 8].cast("Q")[0] = len(data)
        landing = self._clear_other(word) if landed else word & 1
        self._words[0] = (other << 1) | landing
        self.buffers[0] = self._landings[landing]

    def _append(self, identity: int, messages: list[bytes]) -> None:
        if (self._words[0] >> 2) + len(messages) > _LOG_RECORDS:
            self.save(self.on_full())
        word = self._words[0]
        count = word >> 2
        for index, message in enumerate(messages, count):
            _RECORD.pack_into(self._bytes, _LOG + index * _RECORD.size, identity, message)
        other = self._clear_other(word)
        self._words[0] = ((count + len(messages)) << 2) | (word & 2) | other
        self.buffers[0] = self._landings[other]

    def _clear_other(self, word: int) -> int:
        """Make the inactive landing ready to be the active one; return which it is."""
        other = ~word & 1
        self._landings[other][:] = bytes(len(self._landings[other]))
        self._identities[other][0] = self._identities[word & 1][0]
        return other

    # Reading

    def _landed(self) -> list[bytes]:
        landing = self._landings[self._active]
        messages = (bytes(landing[at : at + 32]) for at in range(0, MESSAGES * abi.MESSAGE_SIZE, abi.MESSAGE_SIZE))
        return [message for message in messages if message[0] in _LAYOUT]

    def load(self) -> tuple[Any, list[tuple[int, bytes]]]:
        """Return the snapshot (None where there is none), and the events since then, uncommitted ones included."""
        word = self._words[0]
        at = _SNAPSHOT + (word >> 1 & 1) * _SNAPSHOT_STRIDE
        size = self._bytes[at : at + 8].cast("Q")[0]
        state = json.loads(bytes(self._bytes[at + 8 : at + 8 + size])) if size else None
        events: list[tuple[int, bytes]] = [
            _RECORD.unpack_from(self._bytes, _LOG + index * _RECORD.size) for index in range(word >> 2)
        ]
        identity = self._identities[word & 1][0]
        events += [(identity, message) for message in self._landed()]
        return state, events

    @property
    def fresh(self) -> int:
        """How many of the events that `load` returns were read, and not committed: their reader died right then."""
        return len(self._landed())


def _landing(index: int) -> int:
    return _LANDING + index * _LANDING_STRIDE
