"""The messages that a userfaultfd delivers (`struct uffd_msg`), as values. Addresses are the target's.

`Fork` brings a descriptor, so it is defined beside `Userfaultfd`.
"""

from __future__ import annotations

import enum

import attrs

from aiouffd.kernel.abi import FaultFlag

__all__ = ["MESSAGES", "FaultKind", "PageFault", "Remap", "Remove", "UnknownEvent", "Unmap"]

MESSAGES = 64
"""So many are read at once, at most."""


class FaultKind(enum.Enum):
    """Why the kernel asks.

    MISSING: there is no page. WP: it is write-protected. MINOR: the file has it, but it is not mapped. RWP: it is
    protected against any access (Linux 7.3).
    """

    MISSING = "missing"
    WP = "wp"
    MINOR = "minor"
    RWP = "rwp"


@attrs.frozen
class PageFault:
    """UFFD_EVENT_PAGEFAULT: a thread waits for a page.

    Attributes:
        address: rounded down to the page, unless Feature.EXACT_ADDRESS is on.
        flags: the kernel's flags.
        thread_id: of the faulting thread, in the reader's pid namespace; 0 unless Feature.THREAD_ID is on.
    """

    address: int
    flags: FaultFlag
    thread_id: int

    @property
    def kind(self) -> FaultKind:
        """MISSING, WP, MINOR or RWP."""
        if self.flags & FaultFlag.WP:
            return FaultKind.WP
        if self.flags & FaultFlag.RWP:
            return FaultKind.RWP
        return FaultKind.MINOR if self.flags & FaultFlag.MINOR else FaultKind.MISSING

    @property
    def write(self) -> bool:
        """Whether it was a write access."""
        return bool(self.flags & FaultFlag.WRITE)


@attrs.frozen
class Remap:
    """UFFD_EVENT_REMAP: mremap moved `length` bytes from `source` to `destination`."""

    source: int
    destination: int
    length: int


@attrs.frozen
class Remove:
    """UFFD_EVENT_REMOVE: [start, end) is being emptied (MADV_DONTNEED, MADV_REMOVE); it reads as zeros afterwards.

    A hole that is punched into the file behind shared memory (fallocate) sends no message, in any of its mappings.
    """

    start: int
    end: int


@attrs.frozen
class Unmap:
    """UFFD_EVENT_UNMAP: [start, end) is no longer mapped."""

    start: int
    end: int


@attrs.frozen
class UnknownEvent:
    """A message of a kind that this version does not know; `payload` is the whole message of 32 bytes."""

    code: int
    payload: bytes
