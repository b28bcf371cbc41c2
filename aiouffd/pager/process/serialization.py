"""How what brings the pages travels to the pager.

Sources of this package travel as plain values (JSON) and descriptors: what arrives can be nothing else than such a
source. Sources and handlers of the application's own are pickled by cloudpickle, so that classes and closures of
`__main__` travel by value; to unpickle is to run code, and a pager does that as seldom as `Pickles` says.

An object with a method `travel()` (a source that holds a file or a memfd) is rebuilt from what that returns: a callable
and its arguments. Descriptors among them are numbered, and sent beside the data.
"""

from __future__ import annotations

import base64
import enum
import io
import json
import os
from array import array
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import attrs

from aiouffd.errors import PagerStartError
from aiouffd.sources.base import Descriptor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PRIVATE", "Pickles", "config_of", "described", "is_pickle", "modules", "pack", "unpack", "words_of"]


class Pickles(enum.StrEnum):
    """How often a pager unpickles what its owner sends."""

    NEVER = "never"
    """For the pager that a process shares, and for `aiouffd lazy-pages`: sources of aiouffd only."""
    ONCE = "once"
    """The first time that it is asked to: for a pager that is private to one Monitor."""
    ALWAYS = "always"
    """For the pager of a server or of a `Pager` instance, whose sources are its own program's."""


PRIVATE: Final = 3
"""Descriptors that come with private memory whose pages are dropped; with a memfd it is fewer."""

_MAKERS: Final = frozenset(
    (
        "aiouffd.criu.relay:RelaySource",
        "aiouffd.engine.ahead.pages:RecordedPages._arrived",
        "aiouffd.engine.ahead.trace:Recorder._arrived",
        "aiouffd.engine.ahead.trace:Trace",
        "aiouffd.engine.options:Service",
        "aiouffd.sources.base:ZeroSource",
        "aiouffd.sources.buffer:BufferSource.from_sealed",
        "aiouffd.sources.concat:ConcatSource",
        "aiouffd.sources.file:FileSource.from_descriptor",
        "aiouffd.sources.layered:LayeredSource.arrived",
        "aiouffd.sources.object_store:_rebuild",
        "aiouffd.store.cache:ChunkCache",
        "aiouffd.store.cached_source:CachedSource",
        "aiouffd.store.snapshot_source:_arrived",
        "aiouffd.store.zstd_seekable:_arrived",
    )
)
"""What may be called to rebuild an object from plain values. None of them runs code that came along."""

_ATTRIBUTES: Final = {
    "CachedSource": ("source", "cache"),
    "ChunkCache": ("path", "max_bytes"),
    "ConcatSource": ("parts",),
    "ZeroSource": ("size",),
}
"""The arguments of classes that have neither `travel` nor `__reduce__`, and are no attrs classes."""


class _NotPlainError(Exception):
    """An object is of no kind that travels as plain values."""


def pack(obj: Any) -> tuple[bytes, list[Descriptor]]:
    """Return an object as JSON or a pickle, and the descriptors that must travel beside it, which stay their owners'.

    Raises:
        PagerStartError: it cannot travel.
    """
    descriptors: list[Descriptor] = []
    try:
        return json.dumps(_plain(obj, descriptors)).encode(), descriptors
    except (_NotPlainError, ValueError, RecursionError):
        return _pickled(obj)


def config_of(record: dict[str, Any]) -> bytes:
    """Return what `pack` has made of a service."""
    return os.pread(record["config"], os.fstat(record["config"]).st_size, 0)


def words_of(record: dict[str, Any], fds: Sequence[int]) -> int:
    """Return the descriptor by which pages of private memory are asked to be dropped: see `Owner`; -1: there is none.

    Args:
        record: of an origin.
        fds: its descriptors: the notes, the words and the pagemap are last.
    """
    return fds[-2] if record["memory"] == PRIVATE else -1


def is_pickle(data: bytes) -> bool:
    """Tell what `pack` has returned: JSON is text."""
    return data[:1] == b"\x80"  # pickle.PROTO


def unpack(data: bytes, fds: Sequence[int]) -> Any:
    """Rebuild the object; the descriptors belong to it then. A pickle runs code: see `is_pickle`.

    Raises:
        ValueError: the plain values are not what `pack` makes.
    """
    if is_pickle(data):
        return _unpickled(data, fds)
    return _rebuilt(json.loads(data), fds)


def described(data: bytes) -> str | None:
    """Return what a service's source is made of, without the content of descriptors; None: it is a pickle."""
    if is_pickle(data):
        return None
    ((_, arguments),) = json.loads(data).items()
    return json.dumps(arguments[0])


def modules(data: bytes) -> set[str]:
    """Return the modules that `unpack` imports; what a pickle needs besides cloudpickle is not known."""
    if is_pickle(data):
        return {"cloudpickle"}
    found = set[str]()

    json.loads(data, object_pairs_hook=lambda pairs: found.update(name for name, _ in pairs))
    return {name.partition(":")[0] for name in found & _MAKERS}


# Plain values


def _plain(obj: Any, descriptors: list[Descriptor]) -> Any:
    """Return an object as JSON; what it is, where that is no plain value, is the only key of a JSON object."""
    kind = type(obj)
    if obj is None or kind in (bool, int, float, str):
        return obj
    value: Any
    if kind is Descriptor:
        descriptors.append(obj)
        name, value = "fd", len(descriptors) - 1
    elif kind is dict and all(type(key) is str for key in obj):
        name, value = "dict", {key: _plain(item, descriptors) for key, item in obj.items()}
    elif kind is bytes:
        name, value = "bytes", base64.b64encode(obj).decode()
    elif kind is array:
        name, value = "array", [obj.typecode, base64.b64encode(obj.tobytes()).decode()]
    else:
        name, items = (kind.__name__, obj) if kind in (list, tuple) else _parts(obj)
        value = [_plain(item, descriptors) for item in items]
    return {name: value}


def _parts(obj: Any) -> tuple[str, Sequence[Any]]:
    """Return what rebuilds an object of ours, by name, and its arguments."""
    kind = type(obj)
    if not kind.__module__.startswith("aiouffd."):
        raise _NotPlainError
    if hasattr(kind, "travel"):
        maker, arguments = obj.travel()
    elif kind.__name__ in _ATTRIBUTES:
        maker, arguments = kind, [getattr(obj, name) for name in _ATTRIBUTES[kind.__name__]]
    elif attrs.has(kind):
        maker, arguments = kind, [getattr(obj, field.name) for field in attrs.fields(kind)]
    elif "__reduce__" in vars(kind):
        maker, arguments = obj.__reduce__()[:2]
    else:
        raise _NotPlainError
    name = f"{maker.__module__}:{maker.__qualname__}"
    if name not in _MAKERS:
        raise _NotPlainError
    return name, arguments


def _rebuilt(value: Any, fds: Sequence[int]) -> Any:
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    match name:
        case "fd":
            result: Any = Descriptor(fds[content])
        case "dict":
            result = {key: _rebuilt(item, fds) for key, item in content.items()}
        case "bytes":
            result = base64.b64decode(content)
        case "array":
            result = array(content[0], base64.b64decode(content[1]))
        case "list" | "tuple":
            items = (_rebuilt(item, fds) for item in content)
            result = tuple(items) if name == "tuple" else list(items)
        case _:
            result = _maker(name)(*(_rebuilt(item, fds) for item in content))
    return result


def _maker(name: str) -> Any:
    if name not in _MAKERS:
        raise ValueError(f"{name!r:.80} does not arrive in a pager")
    module, _, path = name.partition(":")
    maker: Any = import_module(module)
    for part in path.split("."):
        maker = getattr(maker, part)
    return maker


# Pickles


def _pickled(obj: Any) -> tuple[bytes, list[Descriptor]]:
    import cloudpickle  # noqa: PLC0415 - a pager whose source is ours has no use for it

    descriptors: list[Descriptor] = []

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, Descriptor):
                return None
            descriptors.append(obj)
            return len(descriptors) - 1

        def reducer_override(self, obj: Any) -> Any:
            if not isinstance(obj, type) and hasattr(type(obj), "travel"):
                return obj.travel()
            return super().reducer_override(obj)

    file = io.BytesIO()
    try:
        Pickler(file).dump(obj)
    except Exception as error:
        name = repr(getattr(obj, "origin", obj))  # of a service, what the user has given
        raise PagerStartError(
            f"{name} cannot travel to the pager process: {error}. Leave out what cannot be pickled (open files,"
            " locks, running loops) and make it in the pager on first use, or run it in this process: engine=InThread()"
            " serves your own threads, engine=InProcess() memory that only others touch"
        ) from error
    return file.getvalue(), descriptors


def _unpickled(data: bytes, fds: Sequence[int]) -> Any:
    import pickle  # noqa: PLC0415 - as cloudpickle, which imports it

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Descriptor:
            return Descriptor(fds[pid])

    return Unpickler(io.BytesIO(data)).load()
