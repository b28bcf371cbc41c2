"""`handoff.json_lines`: what is cut into messages, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.handoff.json_lines import Lines, line

_messages = st.lists(
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(), st.none(), st.lists(st.booleans()))),
    max_size=5,
)


@given(_messages, st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_messages_arrive_however_they_are_cut(messages: list[dict[str, Any]], steps: list[int]) -> None:
    """A line may come in pieces, and several at once; a newline within a text does not end one."""
    data = b"".join(line(message) for message in messages)
    lines, found, at, turn = Lines(), [], 0, 0
    while at < len(data):
        step = steps[turn % len(steps)]
        found += list(lines.feed(data[at : at + step]))
        at, turn = at + step, turn + 1
    assert found == messages


@pytest.mark.parametrize("data", [b"x\n", b"[1]\n", b"5\n", b"\n", b"\xff\n", b"[" * 50_000 + b"\n", b'{"a": 1\n'])
def test_what_is_no_object_is_refused(data: bytes) -> None:
    """With the beginning of what it is."""
    with pytest.raises(ValueError, match="is not a JSON object"):
        list(Lines().feed(data))


def test_what_is_before_a_bad_line_arrives() -> None:
    """Its messages are complete."""
    messages = Lines().feed(b'{"a":1}\nnonsense\n')
    assert next(messages) == {"a": 1}
    with pytest.raises(ValueError, match="nonsense"):
        next(messages)


def test_a_line_without_end_is_refused() -> None:
    """It is not kept without limit."""
    lines = Lines()
    assert list(lines.feed(b" " * (64 << 10))) == []
    with pytest.raises(ValueError, match="more than 65536 bytes"):
        list(lines.feed(b" "))
