"""The error tree. Every exception of this package is an `UffdError`.

They are split by the cause: `UnsupportedError` (the kernel), `AccessError` (permissions), `LimitError` (a limit of the
process or machine), `PopulatedError` (locked memory), `OperationError` (the kernel refused an operation), `ClosedError`
and `BusyError` (the caller), `SourceError` (where the data come from; `StoreError`: a snapshot), `WriteBackError`
(where they go), `HandlerError` (the caller's coroutine), `PagerError` (our own processes), `HandoffError` (a peer on a
socket), `SessionError` (a server's sessions). Exceptions carry their data and build their sentence from it.
"""

from __future__ import annotations

import builtins
import errno as _errno
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = [
    "AccessError",
    "BusyError",
    "ClosedError",
    "FormatError",
    "HandlerError",
    "HandoffError",
    "LayoutChangingError",
    "LimitError",
    "NativePartError",
    "OperationError",
    "PagePresentError",
    "PagerDiedError",
    "PagerError",
    "PagerStartError",
    "PopulatedError",
    "RangeGoneError",
    "SessionError",
    "ShortReadError",
    "SourceError",
    "SourceTimeoutError",
    "StoreError",
    "TargetExitedError",
    "TraceError",
    "UffdError",
    "UnsupportedError",
    "WriteBackError",
]


class UffdError(Exception):
    """Base of all errors of this package."""


class UnsupportedError(UffdError):
    """The kernel lacks something that was asked for.

    Attributes:
        missing: what the kernel lacks.
        available: what it has instead.
    """

    def __init__(self, missing: str, available: str) -> None:
        super().__init__(missing, available)
        self.missing = missing
        self.available = available

    def __str__(self) -> str:
        return f"this kernel lacks {self.missing} (it has: {self.available})"


class NativePartError(UnsupportedError):
    """The native part of this package, which is written in C, is needed and could not be built or loaded.

    Attributes:
        why: the reason, and what to do.
    """

    def __init__(self, why: str) -> None:
        super().__init__("the native part of aiouffd", why)
        self.why = why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.why,)

    def __str__(self) -> str:
        return f"{self.why}; everything else works without the native part"


class AccessError(UffdError, PermissionError):
    """This process may not do something that the machine can do.

    Attributes:
        what: what was refused.
        remedy: what would allow it, by name.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(_errno.EPERM, what)
        self.what = what
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.remedy)

    def __str__(self) -> str:
        return f"{self.what}: not permitted. {self.remedy}"


class LimitError(UffdError, OSError):
    """A limit of the process or the machine is too low.

    Attributes:
        what: what could not be had.
        limit: the name of the limit, for example `RLIMIT_AS`.
        value: what it is now.
        hint: how to raise it, or what else may have refused.
        errno: the kernel's answer.
    """

    def __init__(self, what: str, limit: str, value: str, hint: str, errno: int) -> None:
        super().__init__(errno, os.strerror(errno))
        self.what = what
        self.limit = limit
        self.value = value
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.limit, self.value, self.hint, self.errno)

    def __str__(self) -> str:
        return f"{self.what}: {self.strerror}; {self.limit} is {self.value}: {self.hint}"


class PopulatedError(UffdError):
    """Pages that should be missing are present: the kernel has filled them with zeros, or would have to.

    Attributes:
        what: has happened, or would.
        remedy: what to do about it.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}"


class OperationError(UffdError, OSError):
    """The kernel refused an operation, and did nothing.

    Attributes:
        operation: the ioctl's name, for example `UFFDIO_COPY`.
        start: first address of the range, or 0 if the operation has none.
        len: its length in bytes.
        errno: the kernel's answer.
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

    Read the pending events, then retry, on a timer: nothing makes the descriptor readable a second time.
    """

    _advice = "a layout event is pending: read the events, then retry"


class PagePresentError(OperationError):
    """EEXIST: the first page of the range is present. The kernel has woken nobody: WAKE it, and skip it."""

    _advice = "the page is present: wake its waiters and go on behind it"


class RangeGoneError(OperationError):
    """ENOENT: no single registered mapping covers the range (any more)."""

    _advice = "no single registered mapping covers it: it was unmapped, moved, split or never registered"


class TargetExitedError(OperationError):
    """ESRCH (ENOSPC on Linux 4.11-4.12): the process whose memory this was has exited."""

    _advice = "the process that owned this memory has exited: close the descriptor"


class BusyError(OperationError):
    """EBUSY: another userfaultfd or Monitor uses the memory, or a page is pinned or shared."""

    _advice = "it is in use: wait until it is let go"


class ClosedError(UffdError):
    """The object was closed, or its `with` block was left, before this call."""


class SourceError(UffdError):
    """A source could not deliver bytes.

    Attributes:
        source: as text.
        offset: of the first byte, in the source.
        length: in bytes.
        reason: what went wrong; the exception that says so, if there was one, is `__cause__`.
    """

    def __init__(self, source: str, offset: int, length: int, reason: str) -> None:
        super().__init__(source, offset, length, reason)
        self.source = source
        self.offset = offset
        self.length = length
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # TimeoutError, a base of SourceTimeoutError, keeps two arguments only
        return type(self), (self.source, self.offset, self.length, self.reason)

    def __str__(self) -> str:
        where = f" [{self.offset}, {self.offset + self.length})" if self.length else ""
        return f"{self.source}{where}: {self.reason}"


class SourceTimeoutError(SourceError, TimeoutError):
    """The source did not answer in time."""


class ShortReadError(SourceError):
    """The source delivered fewer bytes than its size says."""


class StoreError(SourceError):
    """A snapshot cannot be read or written: an object of it is damaged, missing, or of an unknown version.

    Attributes:
        source: the object that is to blame, as text.
        chunk: the number of the chunk that it is about; None: the whole object.
        offset: of the chunk in the image, in bytes; 0 for a whole object.
        length: of the chunk in the image, in bytes; 0 for a whole object.
        reason: what is wrong.
    """

    def __init__(self, source: str, offset: int, length: int, reason: str, chunk: int | None = None) -> None:
        super().__init__(source, offset, length, reason)
        self.chunk = chunk

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.offset, self.length, self.reason, self.chunk)

    def __str__(self) -> str:
        where = "" if self.chunk is None else f", chunk {self.chunk} [{self.offset}, {self.offset + self.length})"
        return f"{self.source}{where}: {self.reason}"


class WriteBackError(UffdError):
    """Pages could not be written to their source. They stay in memory, and count as written.

    Attributes:
        source: what it is.
        reason: of the first of them.
        ranges: (offset, length) of them.
    """

    def __init__(self, source: str, reason: str, *bounds: int) -> None:
        self.source: str = source
        self.reason: str = reason
        self.ranges: list[tuple[int, int]] = list(zip(bounds[::2], bounds[1::2], strict=True))
        super().__init__(source, reason, *bounds)

    def __str__(self) -> str:
        first = ", ".join(f"[{start}, {start + length})" for start, length in self.ranges[:3])
        first += ", ..." if len(self.ranges) > 3 else ""
        return f"{self.source} did not take back {first or 'what was written'}: {self.reason}"


class FormatError(UffdError, ValueError):
    """A file is not what its format demands, or has what cannot be mapped.

    Attributes:
        file: as text.
        offset: of what is wrong, in bytes.
        reason: what is wrong.
    """

    def __init__(self, file: str, offset: int, reason: str) -> None:
        super().__init__(file, offset, reason)
        self.file = file
        self.offset = offset
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}, at byte {self.offset}: {self.reason}"


class HandlerError(UffdError):
    """A handler coroutine raised, did not resolve its fault, or resolved another one.

    Attributes:
        handler: as text.
        fault: what it was called for, as text.
        reason: what it did.
    """

    def __init__(self, handler: str, fault: str, reason: str) -> None:
        super().__init__(handler, fault, reason)
        self.handler = handler
        self.fault = fault
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.handler} was called for {self.fault} and {self.reason}"


class PagerError(UffdError):
    """The pager process failed."""


class PagerStartError(PagerError):
    """The pager could not be started, or its source or handler could not be sent to it."""


class PagerDiedError(PagerError):
    """The pager died repeatedly, and resolved no fault in between. It is not started again."""


class HandoffError(UffdError):
    """A peer sent something that the handoff protocol does not allow.

    Attributes:
        peer: as text.
        reason: what was wrong.
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer = peer
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.peer}: {self.reason}"


class SessionError(UffdError):
    """A session of a server is not there, is there already, or is not in a state for what was asked for.

    Attributes:
        session: its name.
        reason: what is wrong.
    """

    def __init__(self, session: str, reason: str) -> None:
        super().__init__(session, reason)
        self.session = session
        self.reason = reason

    def __str__(self) -> str:
        return f"the session {self.session!r} {self.reason}"


class TraceError(UffdError):
    """A file is not a recording that can be replayed.

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
    ("SIGBUS", _errno.EBUSY): (
        "other handlers were installed over aiouffd's too often: install it before entering, or serve with Pager()"
    ),
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
    ("UFFDIO_API", _errno.EINVAL): (
        "the handshake was done before, or the kernel does not allow these features together"
    ),
    ("UFFDIO_RWPROTECT", _errno.EINVAL): "start and len must be page-aligned, and the range registered for RWP",
    ("UFFDIO_SET_MODE", _errno.EINVAL): "only Feature.RWP_ASYNC can be switched (Linux 7.3)",
}


_READ_HINTS: dict[int, str] = {
    _errno.ENOTCONN: "the daemon of its FUSE file system has ended",
    _errno.ESTALE: "it was replaced or removed on its file server",
    _errno.EIO: "the disk, or what stands for it, has failed",
    _errno.EFBIG: "RLIMIT_FSIZE (`ulimit -f`) does not allow a file of this size",
}


def read_failure(error: BaseException) -> str:
    """Return why a source could not be read: the exception with its type, and what its errno means there."""
    hint = _READ_HINTS.get(error.errno or 0) if isinstance(error, OSError) else None
    return f"{type(error).__name__}: {error}" + (f" ({hint})" if hint else "")


def operation_error(operation: str, start: int, length: int, errno: int) -> OperationError:
    """Return the typed error for an ioctl's errno."""
    return _BY_ERRNO.get(errno, OperationError)(operation, start, length, errno)


def encode_error(error: BaseException, *, private: bool = True) -> dict[str, Any]:
    """Return an exception as JSON: the name of its type and its arguments; if `private`, its trace and its causes.

    An error that is among its own causes (`raise first from None`, where the second was raised from it) is told once.
    """
    causes = [error]
    while private and (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    encoded: dict[str, Any] | None = None
    for each in reversed(causes):
        encoded = _encode(each, encoded, private=private)
    assert encoded is not None
    return encoded


def _encode(error: BaseException, cause: dict[str, Any] | None, *, private: bool) -> dict[str, Any]:
    import traceback  # noqa: PLC0415 - 2 ms, and most programs have no error to send

    reduced = error.__reduce__() if isinstance(error, UffdError) else (type(error), error.args)
    arguments = [item if isinstance(item, str | int | float | None) else repr(item) for item in reduced[1]]
    return {
        "type": type(error).__name__,
        "args": arguments,
        "text": "".join(traceback.format_exception_only(error)).strip(),
        "trace": "".join(traceback.format_exception(error, chain=False)) if private else "",
        "cause": cause,
    }


def decode_error(data: dict[str, Any]) -> BaseException:
    """Return the exception again. A type that is neither ours nor Python's becomes a `PagerError` with its text."""
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


def unknown_name(whose: str, name: str, known: Iterable[str]) -> TypeError:
    """Return the error of an option that nobody knows, with the nearest one that is known, or all if none is near."""
    import difflib  # noqa: PLC0415 - only for this

    near = difflib.get_close_matches(name, sorted(known), 1)
    takes = f"the nearest that it takes is {near[0]!r}" if near else f"it takes {', '.join(sorted(known))}"
    return TypeError(f"{whose} got an unexpected keyword argument {name!r}; {takes}")


def refuse_unknown(whose: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise the TypeError of the first option that nobody knows."""
    for name in names:
        if name not in known:
            raise unknown_name(whose, name, known)
