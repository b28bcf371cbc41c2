"""The error tree. Every exception of this package is an `UffdError`.

The split is by whose doing it is: `UnsupportedError` (the kernel), `AccessError` (the permissions),
`OperationError` (the kernel refused one operation), `ClosedError` and `BusyError` (the caller),
`SourceError` (the data's origin), `HandlerError` (the caller's coroutine), `PagerError` (our own processes),
`HandoffError` (a peer on a socket). Exceptions carry their data; the sentence is built from it.
"""

from __future__ import annotations

import builtins
import errno as _errno
import os
import traceback
from typing import Any

__all__ = [
    "AccessError",
    "BusyError",
    "ClosedError",
    "HandlerError",
    "HandoffError",
    "LayoutChangingError",
    "NativePartError",
    "OperationError",
    "PagePresentError",
    "PagerDiedError",
    "PagerError",
    "PagerStartError",
    "RangeGoneError",
    "ShortReadError",
    "SourceError",
    "SourceTimeoutError",
    "TargetExitedError",
    "TraceError",
    "UffdError",
    "UnsupportedError",
]


class UffdError(Exception):
    """Base of all errors of this package."""


class UnsupportedError(UffdError):
    """The kernel lacks something that was asked for.

    Attributes:
        missing: what was asked for and is not there.
        available: what the kernel has in its place.
    """

    def __init__(self, missing: str, available: str) -> None:
        super().__init__(missing, available)
        self.missing = missing
        self.available = available

    def __str__(self) -> str:
        return f"this kernel lacks {self.missing} (it has: {self.available})"


class NativePartError(UnsupportedError):
    """The part of this package that is written in C is needed, and is not there.

    Attributes:
        why: it is not there.
    """

    def __init__(self, why: str) -> None:
        super().__init__("the part of aiouffd that is written in C", why)
        self.why = why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.why,)

    def __str__(self) -> str:
        return (
            f"{self.why}. Install a C compiler (the Debian package gcc, for example) and then aiouffd anew, or run"
            " `python -m aiouffd.native`; everything else works without"
        )


class AccessError(UffdError, PermissionError):
    """userfaultfd exists, but this process may not use it that way.

    Attributes:
        what: what was refused.
        remedy: the knobs that would allow it, by name.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(_errno.EPERM, what)
        self.what = what
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.remedy)

    def __str__(self) -> str:
        return f"{self.what}: not permitted. {self.remedy}"


class OperationError(UffdError, OSError):
    """The kernel refused an operation; nothing was done.

    Attributes:
        operation: the ioctl's name, for example `UFFDIO_COPY`.
        start: first address of the range, or 0 where the operation has none.
        len: its length in bytes.
        errno: the kernel's reason.
    """

    _advice = ""

    def __init__(self, operation: str, start: int, len: int, errno: int) -> None:  # noqa: A002 - the kernel's word
        super().__init__(errno, os.strerror(errno))
        self.operation = operation
        self.start = start
        self.len = len

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.operation, self.start, self.len, self.errno)

    def __str__(self) -> str:
        name = _errno.errorcode.get(self.errno or 0, str(self.errno))
        where = f" of [{self.start:#x}, {self.start + self.len:#x})" if self.len else ""
        advice = _ADVICE.get((self.operation, self.errno or 0)) or self._advice
        return f"{self.operation}{where}: {name} ({self.strerror})" + (f"; {advice}" if advice else "")


class LayoutChangingError(OperationError):
    """EAGAIN: the target's memory layout is changing (fork, mremap, madvise, munmap under way).

    Read the pending events, then try again; nothing makes the descriptor readable a second time.
    """

    _advice = "a layout event is pending: read the events, then retry"


class PagePresentError(OperationError):
    """EEXIST: the first page of the range is already there. Nobody was woken: WAKE it, and skip it."""

    _advice = "the page is already present: wake its waiters and go on behind it"


class RangeGoneError(OperationError):
    """ENOENT: no registered mapping covers the range (any more), or the range spans two mappings."""

    _advice = "no single registered mapping covers it: it was unmapped, moved, split or never registered"


class TargetExitedError(OperationError):
    """ESRCH (ENOSPC on Linux 4.11-4.12): the process whose memory this was has exited."""

    _advice = "the process that owned this memory has exited: close the descriptor"


class BusyError(OperationError):
    """EBUSY: someone else is using it: another userfaultfd, another Monitor, or pinned and shared pages."""

    _advice = "it is in use by somebody else"


class ClosedError(UffdError):
    """The object was closed, or its `with` block was left, before this call."""


class SourceError(UffdError):
    """A source could not give the bytes that it was asked for.

    Attributes:
        source: which source, as text.
        offset: first byte asked for, as an offset in the source.
        length: how many bytes were asked for.
        reason: what went wrong; the exception itself, where there was one, is `__cause__`.
    """

    def __init__(self, source: str, offset: int, length: int, reason: str) -> None:
        super().__init__(source, offset, length, reason)
        self.source = source
        self.offset = offset
        self.length = length
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # TimeoutError, of which a kind is, drops what is behind the second
        return type(self), (self.source, self.offset, self.length, self.reason)

    def __str__(self) -> str:
        where = f" [{self.offset}, {self.offset + self.length})" if self.length else ""
        return f"{self.source}{where}: {self.reason}"


class SourceTimeoutError(SourceError, TimeoutError):
    """The source did not answer in time."""


class ShortReadError(SourceError):
    """The source gave fewer bytes than it has said that it has."""


class HandlerError(UffdError):
    """A handler coroutine raised, never resolved its fault, or resolved another one.

    Attributes:
        handler: which handler, as text.
        fault: the fault that it was given, as text.
        reason: what it did.
    """

    def __init__(self, handler: str, fault: str, reason: str) -> None:
        super().__init__(handler, fault, reason)
        self.handler = handler
        self.fault = fault
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.handler} was given {self.fault} and {self.reason}"


class PagerError(UffdError):
    """The pager process failed."""


class PagerStartError(PagerError):
    """The pager could not be started, or what it should run could not travel to it."""


class PagerDiedError(PagerError):
    """The pager died again and again without resolving one fault between its deaths, and was given up."""


class HandoffError(UffdError):
    """A peer sent something that the handoff protocol does not allow.

    Attributes:
        peer: who, as text.
        reason: what was wrong with it.
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer = peer
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.peer}: {self.reason}"


class TraceError(UffdError):
    """A file is no recording that can be replayed.

    Attributes:
        path: of the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


_BY_ERRNO: dict[int, type[OperationError]] = {
    _errno.EAGAIN: LayoutChangingError,
    _errno.EEXIST: PagePresentError,
    _errno.ENOENT: RangeGoneError,
    _errno.ESRCH: TargetExitedError,
    _errno.ENOSPC: TargetExitedError,  # what 4.11 and 4.12 said in place of ESRCH
    _errno.EBUSY: BusyError,
}

_ADVICE: dict[tuple[str, int], str] = {
    ("UFFDIO_REGISTER", _errno.EINVAL): (
        "start and len must be multiples of the page size of a mapping of a supported kind"
        " (anonymous, shmem or hugetlb), and the mode one that the kind supports"
    ),
    ("UFFDIO_REGISTER", _errno.EBUSY): (
        "a range can be registered with one userfaultfd only: another Monitor serves it, or one was left with"
        ' on_exit="sigbus"; make another Region'
    ),
    ("UFFDIO_MOVE", _errno.EBUSY): "a page is pinned, or shared with a forked child: copy it",
    ("munmap", _errno.EBUSY): "a Monitor serves it: leave its `with` block first",
    ("UFFDIO_REGISTER", _errno.EPERM): "a file mapped without write permission cannot be registered",
    ("UFFDIO_REGISTER", _errno.ENOMEM): "the process has exited, or vm.max_map_count is reached: register fewer ranges",
    ("UFFDIO_UNREGISTER", _errno.ENOMEM): "the process that owned this memory has exited",
    ("UFFDIO_UNREGISTER", _errno.EINVAL): "start and len must be page-aligned and cover mappings of a supported kind",
    ("UFFDIO_COPY", _errno.EINVAL): "dst and len must be multiples of the mapping's page size",
    ("UFFDIO_COPY", _errno.EFAULT): "the source buffer cannot be read: was the file behind it truncated?",
    ("UFFDIO_COPY", _errno.ENOMEM): "no memory (or no huge page, see vm.nr_hugepages) for the new page",
    ("UFFDIO_ZEROPAGE", _errno.EINVAL): "start and len must be page-aligned; hugetlb has no ZEROPAGE: copy zeros",
    ("UFFDIO_CONTINUE", _errno.EFAULT): "the page cache holds no such page: write the file's page first",
    ("UFFDIO_MOVE", _errno.EINVAL): "both ranges must be anonymous memory of this process, equally protected",
    ("UFFDIO_API", _errno.EINVAL): "the handshake was done before, or a feature is not supported",
}


def operation_error(operation: str, start: int, length: int, errno: int) -> OperationError:
    """Return the typed error for what an ioctl answered."""
    return _BY_ERRNO.get(errno, OperationError)(operation, start, length, errno)


def encode_error(error: BaseException, *, private: bool = True) -> dict[str, Any]:
    """Return an exception as JSON: its type's name, its arguments; unless others read it, its trace and its causes."""
    reduced = error.__reduce__() if isinstance(error, UffdError) else (type(error), error.args)
    arguments = [item if isinstance(item, str | int | float | None) else repr(item) for item in reduced[1]]
    cause = error.__cause__ or error.__context__
    return {
        "type": type(error).__name__,
        "args": arguments,
        "text": "".join(traceback.format_exception_only(error)).strip(),
        "trace": "".join(traceback.format_exception(error, chain=False)) if private else "",
        "cause": encode_error(cause) if cause is not None and private else None,
    }


def decode_error(data: dict[str, Any]) -> BaseException:
    """Return the exception again: of its own type where that is ours or Python's, else a `PagerError` with its text."""
    kind = globals().get(data["type"]) or getattr(builtins, data["type"], None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        kind = None
    try:
        error: BaseException = kind(*data["args"]) if kind is not None else PagerError(data["text"])
    except TypeError:
        error = PagerError(data["text"])
    if data["trace"]:
        error.add_note("in the pager:\n" + data["trace"].rstrip())
    if data["cause"] is not None:
        error.__cause__ = decode_error(data["cause"])
    return error
