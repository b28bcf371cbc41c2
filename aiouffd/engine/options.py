"""What serves a region, and how: plain values that travel to where the engine runs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

import attrs

from aiouffd.engine.serve.bounds import Limits
from aiouffd.kernel.abi import RegisterMode

if TYPE_CHECKING:
    from aiouffd.engine.ahead.trace import Recorder, Trace

__all__ = ["Options", "Service", "checked"]


@attrs.frozen(eq=False, repr=False)
class Service:
    """What serves a region; it travels to where the engine runs.

    Attributes:
        origin: a `Source` or a `Handler`.
        recorder: notes the pages that are touched, in order.
        trace: pages to bring before they are touched.
    """

    origin: Any
    recorder: Recorder | None = None
    trace: Trace | None = None


@attrs.frozen(repr=False)
class Options:
    """How a region is served; the same in a pager and in one's own process.

    Attributes:
        readahead: the largest window that a fault brings, in bytes; 0: page by page.
        spin_us: microseconds to look again for faults before sleeping.
        background: bytes per second, at most, that are brought without being asked for; 0: none.
        modes: the `RegisterMode` of the memory.
        write_protect: pages come write-protected, so that writes can be told from loads.
        limits: bounds, timeouts and retries.
        on_error: what becomes of a page that cannot be had: "sigbus", or "retry": its threads wait until it can; or
            "hold": also where the pager is given up.
        max_resident: bytes that are there at most; pages that were not written are dropped. None: as many as come.
        write_back: pages that were written go to the source.
        bounded: pages may be dropped, and come write-protected.
        traces: somebody is told of each read and its steps.
        foreign: the memory's file is of a process that is not trusted.
        one_copy: page size of the file of memory that all maps privately what is served, in bytes; 0: none does.
    """

    readahead: int = attrs.field(default=2 << 20, validator=attrs.validators.ge(0))
    spin_us: int = attrs.field(default=50, validator=attrs.validators.ge(0))
    background: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    modes: int = RegisterMode.MISSING
    write_protect: bool = False
    limits: Limits = attrs.field(factory=Limits)
    on_error: Literal["sigbus", "retry", "hold"] = "sigbus"
    max_resident: int | None = None
    bounded: bool = False
    write_back: bool = False
    traces: bool = False
    one_copy: int = 0
    foreign: bool = False

    def of(self, modes: RegisterMode) -> Options:
        """Return the same of memory that is registered so; `attrs.evolve` takes 5 us."""
        others = self.write_protect, self.limits, self.on_error, self.max_resident, self.bounded
        return Options(self.readahead, self.spin_us, self.background, int(modes), *others, self.write_back, self.traces)


def checked(origin: Any) -> Any:
    """Return a source or handler; TypeError for what is neither, and for a Handler that overrides nothing, or wrongly.

    Its size is not asked for: that may take time.
    """
    is_source = callable(getattr(origin, "read", None))
    if isinstance(origin, type) or not (is_source or _is_handler(origin)):
        raise TypeError(
            f"{origin!r:.120} is no Source and no Handler: give an instance of one, as FileSource(path),"
            " ObjectSource(url) or BufferSource(data); aiouffd.open chooses one"
        )
    kind = type(origin)
    has_size = any(hasattr(kind, name) for name in ("size", "__getattr__")) or "size" in getattr(origin, "__dict__", ())
    if is_source and (not has_size or inspect.isroutine(getattr(kind, "size", None))):
        raise TypeError(f"{kind.__name__} has no `size`: a source has an attribute of that name, in bytes")
    return origin


def _is_handler(origin: Any) -> bool:
    from aiouffd.engine.serve.handler import Handler  # noqa: PLC0415 - 4 ms, and few programs have one

    if not isinstance(origin, Handler):
        return False
    kind = type(origin)
    hooks = [name for name in vars(Handler) if not name.startswith("_")]
    if kind is not Handler and all(getattr(kind, name) is getattr(Handler, name) for name in hooks):
        raise TypeError(f"{kind.__name__} overrides none of {', '.join(hooks)}: all of its pages would be zeros")
    for name in hooks:
        function = inspect.unwrap(getattr(getattr(origin, name), "__func__", getattr(origin, name)))
        if inspect.isfunction(function) and not inspect.iscoroutinefunction(function):
            raise TypeError(f"{kind.__name__}.{name} is no coroutine function: it must be `async def {name}(...)`")
    return True
