"""Faults by time, as Perfetto shows them: a file of Chrome's trace events (JSON), which ui.perfetto.dev opens.

Each event is a line, and the closing bracket may be missing, as that format allows: so the file of a process that was
killed can be read, too. Times are those of CLOCK_MONOTONIC, in microseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import stat
import threading
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from aiouffd.kernel.abi import FaultFlag
from aiouffd.report.observers import install, installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from aiouffd.engine.statistics import Statistics

__all__ = ["FaultLog", "events"]

log: logging.Logger = logging.getLogger("aiouffd")

_MOST: Final = 256 << 20  # bytes of a file
_IN_ORDER: Final = ("queue", "read", "retry")  # steps of which one begins when another has ended


def events(pid: int, number: int, flight: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the trace events of a flight (see `Landings`): the faults that waited for it, its read and the steps.

    Args:
        pid: of the process whose memory it is.
        number: that no other flight of the file has.
        flight: what is told of it.
    """
    about = {"offset": hex(flight["offset"]), "length": flight["length"]}
    for index, (address, thread, flags, since) in enumerate(flight["faults"]):
        access = "write" if flags & FaultFlag.WRITE else "read"
        told = {**about, "address": hex(address), "kind": "missing", "access": access, "cause": flight["cause"]}
        if thread:
            times = {"ts": since / 1000, "dur": (flight["ended_ns"] - since) / 1000}
            yield {"ph": "X", "cat": "fault", "name": "fault", "pid": pid, "tid": thread, **times, "args": told}
        else:  # the client has not asked for thread ids: two of its faults may overlap
            yield from _span("fault", "fault", pid, f"{number}.{index}", since, flight["ended_ns"], told)
    told = {**about, "for": flight["for"], "error": flight["reason"], "left out before": flight["omitted"]}
    steps = [(name, *times, details) for name, *times, details in flight["steps"] if name in _IN_ORDER]
    yield from _span("fetch", "read", pid, str(number), flight["began_ns"], flight["ended_ns"], told, steps)
    for index, (name, began, ended, details) in enumerate(flight["steps"]):
        if name not in _IN_ORDER:
            yield from _span(name, name, pid, f"{number}.{index}", began, ended, details)


def _span(
    name: str,
    kind: str,
    pid: int,
    identity: str,
    began: int,
    ended: int,
    told: Mapping[str, Any],
    steps: list[Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the two events of what may overlap with others, and those of what lies within it."""
    common = {"cat": kind, "pid": pid, "tid": 0, "id": identity}
    yield {"ph": "b", "name": name, **common, "ts": began / 1000, "args": told}
    for step, start, stop, details in steps or ():
        yield {"ph": "b", "name": step, **common, "ts": start / 1000, "args": details}
        yield {"ph": "e", "name": step, **common, "ts": stop / 1000}
    yield {"ph": "e", "name": name, **common, "ts": ended / 1000}


def _begin(path: Path) -> int:
    """Return a descriptor of the empty file, which is locked: so another process sees that it is written."""
    while True:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # a pipe, a terminal
            return fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            before = path.rename(path.with_stem(f"{path.stem}.before"))
            log.warning("another process writes %s still: its file is %s from now on", path, before)
            continue
        except OSError as error:
            log.debug("%s: no locks: %s", path, error)  # of this file system
        os.ftruncate(fd, 0)
        return fd


class FaultLog:
    """Writes the faults of what is entered in its block: those that had to wait for a read, with their cause.

    A context manager, from making it on: the Monitors and servers that are entered then are told of, until it is left.
    Of each source, up to 500 reads a second. What is in memory is placed in microseconds, and only counted.

    Args:
        path: of the file, which is replaced. It grows up to 256 MiB. One that another process writes still, as a server
            that is taken over from, goes on by the name NAME.before.SUFFIX.

    Raises:
        OSError: it cannot be written.
        RuntimeError: somebody else is told already: another one, or OpenTelemetry.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if installed() is not None:
            raise RuntimeError("somebody is told of faults already: another FaultLog, or OpenTelemetry")
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._named: set[int] = set()
        self._pid = os.getpid()
        self._left = _MOST
        # Each line is written at once: nothing is left to be written a second time by a forked child.
        self._file = os.fdopen(_begin(Path(path)), "w", buffering=1, encoding="utf-8")
        self._path = path
        self._file.write("[\n")
        install(self)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the file."""
        self.leave()

    def leave(self) -> None:
        """As leaving the block: this process may end without being finalized."""
        install(None)
        with self._lock, contextlib.suppress(OSError):  # a full disk, as below
            if not self._file.closed and os.getpid() == self._pid:
                with self._file:
                    self._file.write(json.dumps({"ph": "M", "name": "end", "pid": 0}) + "\n]\n")

    def monitor(self, facts: Mapping[str, str | int]) -> _Watch:
        """Watch a Monitor."""
        return _Watch(self, str(facts["source"]))

    def server(self, server: Any) -> _ServerWatch:
        """Watch a server."""
        return _ServerWatch(self)

    def write(self, pid: int, name: str, told: Mapping[str, Any]) -> None:
        """Write what is told of a flight; name: of what the process is, for people."""
        if "flight" not in told or os.getpid() != self._pid:
            return
        with self._lock:
            if self._file.closed or self._left <= 0:
                return
            found = list(events(pid, next(self._numbers), told["flight"]))
            if pid not in self._named:
                self._named.add(pid)
                found.insert(0, {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})
            text = "".join(json.dumps(event, separators=(",", ":")) + ",\n" for event in found)
            self._left -= len(text)
            why = f"it has {_MOST >> 20} MiB"
            try:
                self._file.write(text)
            except OSError as error:  # a full disk, for example: what serves goes on
                self._left, why = 0, error.strerror or str(error)
            if self._left <= 0:
                log.warning("%s: faults are written no longer: %s", self._path, why)


class _Watch:
    """The `MonitorWatch`."""

    traces = True

    def __init__(self, to: FaultLog, name: str) -> None:
        self._log = to
        self._name = name

    def begin(self, statistics: Callable[[], Statistics]) -> None: ...
    def leaving(self) -> None: ...
    def end(self, raised: type[BaseException] | None) -> None: ...

    def flight(self, told: Mapping[str, Any]) -> None:
        self._log.write(os.getpid(), self._name, told)


class _ServerWatch:
    """The `ServerWatch`."""

    def __init__(self, to: FaultLog) -> None:
        self._log = to

    def happened(self, session: str, kind: str, details: Mapping[str, Any]) -> None: ...
    def end(self) -> None: ...

    def flight(self, session: str, client: Any, told: Mapping[str, Any]) -> None:
        self._log.write(client.peer.pid, str(client), told)
