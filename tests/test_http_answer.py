"""`sources.http_answer`: when two answers are of different versions of an object."""

from __future__ import annotations

import datetime as dt
import email.utils
import json

import pytest

from aiouffd.sources.http_answer import Validator, seconds_of

MONDAY, TUESDAY = (dt.datetime(2026, 11, day, tzinfo=dt.UTC) for day in (2, 3))


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        (Validator(5), Validator(5), False),
        (Validator(5), Validator(6), True),
        (Validator(5), Validator(None), False),
        (Validator(5, '"a"'), Validator(5, '"a"'), False),
        (Validator(5, '"a"'), Validator(5, '"b"'), True),
        (Validator(5, '"a"'), Validator(5), False),
        (Validator(5, 'W/"a"'), Validator(5, 'W/"b"'), True),
        (Validator(5, 'W/"a"'), Validator(5, '"a"'), True),
        (Validator(5, None, MONDAY), Validator(5, None, TUESDAY), True),
        (Validator(5, None, MONDAY), Validator(5), False),
        (Validator(5, 'W/"a"', MONDAY), Validator(5, 'W/"a"', TUESDAY), True),
        (Validator(5, '"a"', MONDAY), Validator(5, '"a"', TUESDAY), False),  # the copies of one version
        (Validator(5, '"a"', MONDAY), Validator(6, '"a"', MONDAY), True),
    ],
)
def test_what_differs(one: Validator, other: Validator, differ: bool) -> None:
    """Size, ETag, Last-Modified, in either order; what one of them does not say is no difference."""
    assert one.contradicts(other) is differ
    assert other.contradicts(one) is differ


@pytest.mark.parametrize("modified", [None, MONDAY])
def test_plain_values(modified: dt.datetime | None) -> None:
    """What travels to the pager is JSON."""
    one = Validator(5, 'W/"a"', modified)
    assert Validator.of_plain(*json.loads(json.dumps(one.plain()))) == one


def test_a_weak_tag_is_no_promise() -> None:
    """If-Match never matches it."""
    assert Validator(5, '"a"').strong_tag == '"a"'
    assert Validator(5, 'W/"a"').strong_tag is None
    assert Validator(5).strong_tag is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, 0), ("", 0), ("120", 120), (" 7 ", 7), ("-3", 0), ("soon", 0), ("9" * 400, float("inf")), ("Mon, 99", 0)],
)
def test_retry_after(text: str | None, seconds: float) -> None:
    """What is no number of seconds and no time asks for nothing."""
    assert seconds_of(text) == seconds


def test_retry_after_as_a_time() -> None:
    """From now on; one that is past asks for nothing."""
    now = dt.datetime.now(dt.UTC)
    later, before = (email.utils.format_datetime(now + dt.timedelta(hours=n), usegmt=True) for n in (1, -1))
    assert 3000 < seconds_of(later) <= 3600
    assert seconds_of(before) == 0
