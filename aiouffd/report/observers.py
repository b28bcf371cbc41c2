"""Who is told what Monitors and servers of this process do: nobody, until `aiouffd.otel` is asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiouffd.engine.statistics import Statistics

__all__ = ["NOBODY", "MonitorWatch", "Observer", "ServerWatch", "install", "installed"]


class MonitorWatch(Protocol):
    """What is told of one Monitor. From any thread."""

    @property
    def traces(self) -> bool:
        """Whether flights are wanted."""

    def begin(self, statistics: Callable[[], Statistics]) -> None:
        """It is served; `statistics` is a method, which is not to be kept alive."""

    def flight(self, told: Mapping[str, Any]) -> None:
        """A flight has landed: see `Landings`."""

    def leaving(self) -> None:
        """It is about to be left: what it has counted is there for the last time. Flights may land still."""

    def end(self, raised: type[BaseException] | None) -> None:
        """It was left, or could not be entered."""


class ServerWatch(Protocol):
    """What is told of one server, on its loop."""

    def happened(self, session: str, kind: str, details: Mapping[str, Any]) -> None:
        """Something that `Happenings` has is told."""

    def flight(self, session: str, client: Any, told: Mapping[str, Any]) -> None:
        """A flight of a `Client` has landed: see `Landings`."""

    def end(self) -> None:
        """It is about to be left."""


class Observer(Protocol):
    """Watches all that is entered while it is installed."""

    def monitor(self, facts: Mapping[str, str | int]) -> MonitorWatch:
        """A Monitor is being entered."""

    def server(self, server: Any) -> ServerWatch:
        """A server is being entered."""


class _Nobody:
    """Is told, and does nothing."""

    traces = False

    def begin(self, statistics: Callable[[], Statistics]) -> None: ...
    def flight(self, *_: Any) -> None: ...
    def happened(self, session: str, kind: str, details: Mapping[str, Any]) -> None: ...
    def leaving(self) -> None: ...
    def end(self, raised: type[BaseException] | None = None) -> None: ...


NOBODY: Final = _Nobody()
"""The watch of what nobody watches."""
_installed: Observer | None = None


def install(observer: Observer | None) -> None:
    """Have somebody told of what is entered from now on; None: nobody."""
    global _installed  # noqa: PLW0603 - one process, one observer
    _installed = observer


def installed() -> Observer | None:
    """Return who is told; None: nobody."""
    return _installed
