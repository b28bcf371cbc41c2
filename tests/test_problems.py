"""`server.control.problems`: each error has an answer that says what to do."""

from __future__ import annotations

import msgspec
import pytest

import aiouffd
from aiouffd.server.control.actions import UnknownSessionError
from aiouffd.server.control.problems import problem_of


@pytest.mark.parametrize(
    ("error", "status", "kind", "detail", "field"),
    [
        (msgspec.ValidationError("Expected `int`, got `str` - at `$.a.b`"), 422, "invalid", "Expected `int`", "$.a.b"),
        (msgspec.ValidationError("Object missing required field `x`"), 422, "invalid", "required field", "$.x"),
        (msgspec.DecodeError("truncated"), 400, "malformed", "truncated", ""),
        (UnknownSessionError("a", "is not there"), 404, "no-session", "the session 'a' is not there", ""),
        (aiouffd.SessionError("a", "records nothing"), 409, "session-state", "records nothing", ""),
        (aiouffd.StoreError("x", 0, 0, "is damaged"), 502, "source", "x: is damaged", ""),
        (aiouffd.PagerDiedError("it died"), 503, "pager", "it died", ""),
        (FileNotFoundError(2, "No such file", "/x"), 409, "system", "/x: No such file", ""),
        (OSError(24, "Too many", "/x"), 409, "system", "the server: Too many open files; RLIMIT_NOFILE is", ""),
        (aiouffd.TraceError("r", "is not a recording"), 500, "failed", "is not a recording", ""),
        (ValueError("wrong - at `$.socket`"), 422, "invalid", "wrong", "$.socket"),
        (ZeroDivisionError(), 500, "bug", "ZeroDivisionError", ""),
    ],
)
def test_each_error(error: Exception, status: int, kind: str, detail: str, field: str) -> None:
    """The first kind that fits."""
    problem = problem_of(error)
    assert (problem.status, problem.type, problem.field) == (status, f"urn:aiouffd:{kind}", field)
    assert detail in problem.detail
    assert " - at " not in problem.detail
    assert problem.advice


def test_a_full_disk() -> None:
    """Whatever could not be written: the path is right, and may be written to."""
    full = OSError(28, "No space left on device", "/x")
    written = aiouffd.StoreError("/y", 0, 0, "it cannot be written")
    written.__cause__ = full
    assert {problem_of(error).advice for error in (full, written)} == {"make room on its file system"}
