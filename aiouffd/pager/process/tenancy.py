"""What a worker serves from, and what it knows of each space besides."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.assembly import Options, Service, make_backend
from aiouffd.engine.serve.reads import Limits
from aiouffd.pager.process.travel import unpack

if TYPE_CHECKING:
    import asyncio

    from aiouffd.engine.serve.handler import HandlerBackend
    from aiouffd.engine.serve.source import SourceBackend
    from aiouffd.engine.statistics import Counters

__all__ = ["Origin", "Tenancy", "build", "config_of"]


class Origin:
    """What serves some spaces: a service, and how it came here."""

    def __init__(
        self, identity: int, record: dict[str, Any], service: Service, backend: SourceBackend | HandlerBackend
    ) -> None:
        self.identity = identity
        self.record = record
        self.service = service
        self.backend = backend
        self.options = _options_of(record)


@attrs.define(eq=False)
class Tenancy:
    """What the worker knows of a space besides.

    Attributes:
        origin: what serves it.
        token: by which it, or the ancestor that it was forked from, is asked for.
        tether: a descriptor to hold open as long as it is served; -1: none.
        ahead: the task that brings pages before they are touched.
        early: the task that begins to bring all of them before its process is ready; and when that is over.
        is_child: of a fork.
        announced: whether the client is told of its end.
    """

    origin: Origin
    token: str
    tether: int = -1
    ahead: asyncio.Task[None] | None = None
    early: tuple[asyncio.Task[None], asyncio.Event] | None = None
    is_child: bool = False
    announced: bool = attrs.field(default=attrs.Factory(lambda self: not self.is_child, takes_self=True))


def build(counters: Counters, identity: int, record: dict[str, Any]) -> Origin:
    """Rebuild a source or handler. The descriptors it gets are its own: those in the record outlive it."""
    for entry in record["path"]:
        if entry not in sys.path:
            sys.path.append(entry)
    service = unpack(config_of(record), [os.dup(fd) for fd in record["fds"]])
    backend = make_backend(service, counters, _options_of(record))
    return Origin(identity, record, service, backend)


def config_of(record: dict[str, Any]) -> bytes:
    """Return what `pack` has made of a service."""
    return os.pread(record["config"], os.fstat(record["config"]).st_size, 0)


def _options_of(record: dict[str, Any]) -> Options:
    """Rebuild the options from JSON."""
    values = dict(record["options"])
    return Options(**{**values, "limits": Limits(**values["limits"])})
