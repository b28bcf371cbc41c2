"""aiouffd: an asyncio framework for Linux userfaultfd. Memory that fills itself on first touch.

Layout (imports point down only): `cli` (commands) > `formats` (files of arrays) > `monitor` (memory of this process) >
`criu`, `server` (memory of others) > `pager` (the process that the loop runs in) > `handoff` (wire formats) > `store`
(snapshots) > `report` (what is told of a run) > `engine` (the core) > `sources` > `testing` (`FakeUffd`), `kernel`
(userfaultfd, typed) > `native` (the part in C) > `rpc`, `ranges`, `lifetime`, `errors`.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiouffd.engine.ahead.pages import Recording
    from aiouffd.engine.ahead.trace import Trace
    from aiouffd.engine.serve.handler import Batch, Fault, Handler
    from aiouffd.engine.statistics import Statistics
    from aiouffd.errors import (
        AccessError,
        BusyError,
        ClosedError,
        FormatError,
        HandlerError,
        HandoffError,
        LayoutChangingError,
        LimitError,
        NativePartError,
        OperationError,
        PagePresentError,
        PagerDiedError,
        PagerError,
        PagerStartError,
        PopulatedError,
        RangeGoneError,
        SessionError,
        ShortReadError,
        SourceError,
        SourceTimeoutError,
        StoreError,
        TargetExitedError,
        TraceError,
        UffdError,
        UnsupportedError,
        WriteBackError,
    )
    from aiouffd.kernel.abi import FaultFlag, Feature, Ioctl, RegisterMode
    from aiouffd.kernel.events import FaultKind, PageFault, Remap, Remove, UnknownEvent, Unmap
    from aiouffd.kernel.region import Region
    from aiouffd.kernel.userfaultfd import Capabilities, Event, Fork, Userfaultfd, probe
    from aiouffd.kernel.write_tracker import WriteTracker
    from aiouffd.monitor.checkpointer import Checkpointer
    from aiouffd.monitor.engines.in_process import InProcess
    from aiouffd.monitor.engines.in_thread import InThread
    from aiouffd.monitor.engines.pager import Pager
    from aiouffd.monitor.engines.served_by import ServedBy
    from aiouffd.monitor.map import map  # noqa: A004 - it is called aiouffd.map
    from aiouffd.monitor.monitor import Monitor
    from aiouffd.monitor.open import open  # noqa: A004 - it is called aiouffd.open
    from aiouffd.monitor.progress import Progress
    from aiouffd.ranges import Address, Offset, Range
    from aiouffd.server.server import Server
    from aiouffd.sources.base import Source, ZeroSource
    from aiouffd.sources.buffer import BufferSource
    from aiouffd.sources.file import FileSource
    from aiouffd.sources.fsspec_source import FsspecSource
    from aiouffd.sources.layered import LayeredSource
    from aiouffd.sources.object_store import ObjectSource
    from aiouffd.sources.storage_options import StorageOptions
    from aiouffd.store.cache import ChunkCache
    from aiouffd.store.snapshot_source import SnapshotSource
    from aiouffd.store.zstd_seekable import ZstdSeekableSource

__version__ = "0.1.0"

__all__ = [
    "AccessError",
    "Address",
    "Batch",
    "BufferSource",
    "BusyError",
    "Capabilities",
    "Checkpointer",
    "ChunkCache",
    "ClosedError",
    "Event",
    "Fault",
    "FaultFlag",
    "FaultKind",
    "Feature",
    "FileSource",
    "Fork",
    "FormatError",
    "FsspecSource",
    "Handler",
    "HandlerError",
    "HandoffError",
    "InProcess",
    "InThread",
    "Ioctl",
    "LayeredSource",
    "LayoutChangingError",
    "LimitError",
    "Monitor",
    "NativePartError",
    "ObjectSource",
    "Offset",
    "OperationError",
    "PageFault",
    "PagePresentError",
    "Pager",
    "PagerDiedError",
    "PagerError",
    "PagerStartError",
    "PopulatedError",
    "Progress",
    "Range",
    "RangeGoneError",
    "Recording",
    "Region",
    "RegisterMode",
    "Remap",
    "Remove",
    "ServedBy",
    "Server",
    "SessionError",
    "ShortReadError",
    "SnapshotSource",
    "Source",
    "SourceError",
    "SourceTimeoutError",
    "Statistics",
    "StorageOptions",
    "StoreError",
    "TargetExitedError",
    "Trace",
    "TraceError",
    "UffdError",
    "UnknownEvent",
    "Unmap",
    "UnsupportedError",
    "Userfaultfd",
    "WriteBackError",
    "WriteTracker",
    "ZeroSource",
    "ZstdSeekableSource",
    "map",
    "open",
    "probe",
]

_HOMES = {
    "engine.ahead.pages": "Recording",
    "engine.ahead.trace": "Trace",
    "engine.serve.handler": "Batch Fault Handler",
    "engine.statistics": "Statistics",
    "errors": (
        "AccessError BusyError ClosedError FormatError HandlerError HandoffError LayoutChangingError LimitError "
        "NativePartError OperationError PagePresentError PagerDiedError PagerError PagerStartError "
        "PopulatedError RangeGoneError SessionError ShortReadError SourceError SourceTimeoutError StoreError "
        "TargetExitedError TraceError UffdError UnsupportedError WriteBackError"
    ),
    "kernel.abi": "FaultFlag Feature Ioctl RegisterMode",
    "kernel.events": "FaultKind PageFault Remap Remove UnknownEvent Unmap",
    "kernel.region": "Region",
    "kernel.userfaultfd": "Capabilities Event Fork Userfaultfd probe",
    "kernel.write_tracker": "WriteTracker",
    "monitor.checkpointer": "Checkpointer",
    "monitor.engines.in_process": "InProcess",
    "monitor.engines.in_thread": "InThread",
    "monitor.engines.pager": "Pager",
    "monitor.engines.served_by": "ServedBy",
    "monitor.map": "map",
    "monitor.monitor": "Monitor",
    "monitor.open": "open",
    "monitor.progress": "Progress",
    "ranges": "Address Offset Range",
    "server.server": "Server",
    "sources.base": "Source ZeroSource",
    "sources.buffer": "BufferSource",
    "sources.file": "FileSource",
    "sources.fsspec_source": "FsspecSource",
    "sources.layered": "LayeredSource",
    "sources.object_store": "ObjectSource",
    "sources.storage_options": "StorageOptions",
    "store.cache": "ChunkCache",
    "store.snapshot_source": "SnapshotSource",
    "store.zstd_seekable": "ZstdSeekableSource",
}
"""Module -> its names."""

_HOME_OF = {name: f"aiouffd.{module}" for module, names in _HOMES.items() for name in names.split()}

_LATE = (
    *("Batch", "Checkpointer", "ChunkCache", "Fault", "FileSource", "FsspecSource", "Handler", "InProcess"),
    *(
        "InThread",
        "LayeredSource",
        "ObjectSource",
        "Progress",
        "Recording",
        "ServedBy",
        "Server",
        "SnapshotSource",
        "Statistics",
    ),
    *("StorageOptions", "Trace", "ZstdSeekableSource", "map", "open"),
)
"""Imported when they are first taken: a Monitor with a pager does without, and they bring many modules."""


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})


# Not on first use in an application, which may give up the right to read these modules, or its root directory. A pager,
# which is started as `python -m aiouffd.pager`, needs few of them.
if "aiouffd.pager" not in sys.orig_argv:
    for _name in __all__:
        if _name not in _LATE:
            __getattr__(_name)
