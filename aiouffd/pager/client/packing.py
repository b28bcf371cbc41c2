"""What brings the pages, made ready to travel to a pager."""

from __future__ import annotations

import fcntl
import itertools
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Self

import attrs

from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.pager.process.handles import duplicates, explained, open_memfd
from aiouffd.pager.process.serialization import config_of, is_pickle, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import FileDescriptorLike

    from aiouffd.engine.options import Options, Service
    from aiouffd.sources.base import Descriptor

__all__ = ["Pack", "copied", "next_token"]

_tokens = itertools.count(time.monotonic_ns())  # a successor of this process may have its pid, and its clients
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def next_token() -> str:
    """Return a name that no other thing has that this process has a pager serve."""
    return f"{os.getpid()}-{next(_tokens)}"


def copied(source: Any) -> Any:
    """Return a source of the same bytes that has a use of its own, by the way that it would take to a pager. May block.

    Raises:
        PagerStartError: it cannot travel.
    """
    data, descriptors = pack(source)
    return unpack(data, duplicates(descriptor.fd for descriptor in descriptors))


class _Arrived(OwnedDescriptor):
    """As a `Descriptor`, which is a source's."""

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self.fileno()


class Pack:
    """A service made ready to travel: its data in a sealed memfd, and the descriptors that go along.

    Args:
        service: what serves. Stays the caller's, who keeps its descriptors open as long as the pack is used.
        options: how.
        memory: what its pages are dropped by: the notes of what was written, and the memfd that the memory maps; or the
            memfd alone; or, of private memory, the notes, and what its `Owner` is asked by. They stay the caller's,
            like those of the service; the pack refers to them until it is closed.
        page_size: of that memory.

    Attributes:
        is_pickle: it is code of the application's own that serves.
        record: what a pager is told of it.

    Raises:
        PagerStartError: it cannot travel.
    """

    def __init__(
        self, service: Service, options: Options, memory: Sequence[FileDescriptorLike] = (), page_size: int = 0
    ) -> None:
        try:
            data, descriptors = pack(service)
        except OSError as error:
            raise explained(f"{service.origin!r} cannot travel to the pager", error) from error
        self.service: Any = service
        self.token: str = next_token()  # a request that is sent twice opens once
        self.options: dict[str, Any] = attrs.asdict(options)
        # Sealed: a forked child has this descriptor, too, and a worker that starts again reads it again.
        self.config: OwnedDescriptor = OwnedDescriptor(
            open_memfd("aiouffd-config", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        )
        with os.fdopen(self.config.fileno(), "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(self.config, fcntl.F_ADD_SEALS, _SEALS)
        self.is_pickle: bool = is_pickle(data)
        self._descriptors: Sequence[Descriptor | _Arrived] = descriptors
        self._memory: Sequence[FileDescriptorLike] = memory
        self.record: dict[str, Any] = {
            "token": self.token,
            "options": self.options,
            "path": [entry for entry in sys.path if entry] if self.is_pickle else [],
            "slot": 0,
            "memory": len(memory),
            "page_size": page_size,
        }

    @classmethod
    def arrived(cls, record: dict[str, Any]) -> Self:
        """Return one that another process has made, from the record of the pager that has served from it.

        Its descriptors belong to the pack from now on.
        """
        pack = cls.__new__(cls)
        pack.token, pack.options = record["token"], record["options"]
        # The version before did not say it: the memory file of a server's client is a stranger's.
        pack.options.setdefault("foreign", bool(record["memory"]) and not pack.options.get("one_copy"))
        pack.config = OwnedDescriptor(record["config"])
        pack.is_pickle = is_pickle(config_of(record))
        pack.service = pack._descriptors = [_Arrived(fd) for fd in record["fds"]]  # noqa: SLF001 - its own
        pack._memory = ()  # noqa: SLF001
        pack.record = {name: value for name, value in record.items() if name not in ("config", "fds")}
        return pack

    @property
    def fds(self) -> list[int]:
        """What goes along with a request that opens a space."""
        memory = (item if isinstance(item, int) else item.fileno() for item in self._memory)
        return [self.config.fileno(), *(item.fd for item in self._descriptors), *memory]

    def opened(self) -> Service:
        """Return the service, made anew from what travels. May block; a pickle runs code."""
        fds = self.fds[1 : len(self.fds) - self.record["memory"]]
        found: Service = unpack(config_of({"config": self.config.fileno()}), duplicates(fds))
        return found

    @property
    def has_memory(self) -> bool:
        """Whether the memfd that the memory maps goes along, and is that memory's alone."""
        return bool(self.record["memory"]) and not self.options.get("one_copy")

    def close(self) -> None:
        """Forget it; what a pager has got of it stays the pager's."""
        if not self.config.closed:
            self.config.close()
            del self.service, self._descriptors, self._memory  # its files may be closed with them, here and now
