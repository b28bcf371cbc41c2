"""What brings the pages, made ready to travel to a pager."""

from __future__ import annotations

import fcntl
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.pager.process.handles import explained, open_memfd
from aiouffd.pager.process.serialization import is_pickle, pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiouffd.engine.options import Options, Service

__all__ = ["Pack", "next_token"]

_tokens = itertools.count()
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def next_token() -> str:
    """Return a name that no other thing has that this process has a pager serve."""
    return f"{os.getpid()}-{next(_tokens)}"


class Pack:
    """A service made ready to travel: its data in a sealed memfd, and the descriptors that go along.

    Args:
        service: what serves. Stays the caller's, who keeps its descriptors open as long as the pack is used.
        options: how.
        memory: descriptors of what its pages are dropped by: the notes of what was written, and the memfd. They stay
            the caller's, like those of the service.
        page_size: of that memory.

    Attributes:
        is_pickle: it is code of the application's own that serves.

    Raises:
        PagerStartError: it cannot travel.
    """

    def __init__(self, service: Service, options: Options, memory: Sequence[int] = (), page_size: int = 0) -> None:
        try:
            data, descriptors = pack(service)
        except OSError as error:
            raise explained(f"{service.origin!r} cannot travel to the pager", error) from error
        self.service = service
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
        self._path = [entry for entry in sys.path if entry] if self.is_pickle else []
        self._descriptors = descriptors
        self._memory, self._page_size = memory, page_size

    @property
    def record(self) -> dict[str, Any]:
        """What a pager is told of it."""
        return {
            "token": self.token,
            "options": self.options,
            "path": self._path,
            "slot": 0,
            "memory": len(self._memory),
            "page_size": self._page_size,
        }

    @property
    def fds(self) -> list[int]:
        """What goes along with a request that opens a space."""
        return [self.config.fileno(), *(item.fd for item in self._descriptors), *self._memory]

    def close(self) -> None:
        """Forget it; what a pager has got of it stays the pager's."""
        if not self.config.closed:
            self.config.close()
            del self.service, self._descriptors  # its files may be closed with them, here and now
