"""A descriptor that belongs to an object."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from aiouffd.lifetime import until_exit

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["OwnedDescriptor"]


class OwnedDescriptor:
    """Closes its descriptor at the end of a `with` block, by `close()`, or when nobody refers to it any more."""

    _fd: int = -1

    def close(self) -> None:
        """Close the descriptor. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def closed(self) -> bool:
        """Whether it has no descriptor any more."""
        return self._fd < 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @until_exit
    def __del__(self) -> None:
        if self._fd >= 0:
            self.close()
