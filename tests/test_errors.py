"""`errors`: what an exception says, and that it survives a pickle."""

from __future__ import annotations

import errno
import pickle

import pytest

from aiouffd import errors

KINDS = {
    errno.EAGAIN: errors.LayoutChangingError,
    errno.EEXIST: errors.PagePresentError,
    errno.ENOENT: errors.RangeGoneError,
    errno.ESRCH: errors.TargetExitedError,
    errno.ENOSPC: errors.TargetExitedError,
    errno.EBUSY: errors.BusyError,
    errno.EINVAL: errors.OperationError,
}


@pytest.mark.parametrize("number", KINDS)
def test_each_errno_has_its_type(number: int) -> None:
    """What an ioctl answers is a typed OSError that carries operation, range and errno."""
    error = errors.operation_error("UFFDIO_COPY", 0x1000, 0x2000, number)
    assert type(error) is KINDS[number]
    assert isinstance(error, OSError)
    assert (error.operation, error.start, error.len, error.errno) == ("UFFDIO_COPY", 0x1000, 0x2000, number)
    assert errno.errorcode[number] in str(error)
    assert "; " in str(error)  # and what to do about it
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


EXAMPLES = [
    errors.UnsupportedError("Feature.X", "Feature.Y"),
    errors.AccessError("opening a userfaultfd", "Use the knob."),
    errors.SourceError("S", 1, 2, "why"),
    errors.SourceTimeoutError("S", 1, 2, "late"),
    errors.ShortReadError("S", 0, 0, "short"),
    errors.HandlerError("H", "the fault", "raised"),
    errors.HandoffError("pid 1", "no descriptor"),
    errors.PagerStartError("no"),
    errors.PagerDiedError("no"),
    errors.NativePartError("no compiler"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_say_what_they_carry_and_can_be_pickled(error: errors.UffdError) -> None:
    """Every argument is in the sentence, and a pickle keeps both."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert isinstance(error, errors.UffdError)


def test_errors_are_also_what_python_calls_them() -> None:
    """AccessError is a PermissionError, SourceTimeoutError a TimeoutError."""
    assert isinstance(EXAMPLES[1], PermissionError)
    assert isinstance(EXAMPLES[3], TimeoutError)


def test_every_error_is_public() -> None:
    """The whole tree is in `__all__`."""
    tree = {errors.UffdError}
    while more := {kind for parent in tree for kind in parent.__subclasses__()} - tree:
        tree |= more
    assert {kind.__name__ for kind in tree if kind.__module__ == errors.__name__} == set(errors.__all__)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), "FUSE"),
        (OSError(errno.ESTALE, "Stale file handle"), "file server"),
        (OSError(errno.EACCES, "Permission denied"), "PermissionError: [Errno 13] Permission denied"),
        (ValueError("no"), "ValueError: no"),
        (OSError("no errno"), "OSError: no errno"),
    ],
)
def test_why_a_source_could_not_be_read(error: Exception, text: str) -> None:
    """The exception itself, and what an errno means there if that is not plain."""
    found = errors.read_failure(error)
    assert found.startswith(f"{type(error).__name__}: {error}")
    assert text in found


def test_an_error_that_is_its_own_cause_is_told_once() -> None:
    """It was, without end: and the request that it answers was never answered."""
    first = ValueError("first")
    second = errors.UffdError("second")
    first.__context__, second.__cause__ = second, first
    found = errors.decode_error(errors.encode_error(first))
    assert (str(found), str(found.__cause__)) == ("first", "second")
    assert found.__cause__ is not None
    assert found.__cause__.__cause__ is None
