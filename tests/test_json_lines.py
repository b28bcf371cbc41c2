"""`handoff.json_lines`: what is cut into messages, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.handoff.json_lines import MOST_RANGES, Lines, line, ranges_of

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


def test_the_ranges_of_a_prefetch() -> None:
    """They are bounded by what the client has, however often it asks for the same; what is none is refused."""
    far = 1 << 60
    asked: list[list[Any]] = [[8192, 4096], [0, 10], [0, 10], [4096, far], [far, far]]
    assert ranges_of({"ranges": asked}, 16384) == [(0, 10), (4096, 12288)]
    assert ranges_of({"ranges": []}, 16384) == []
    most = line({"id": 1 << 60, "op": "prefetch", "ranges": [[far, far]] * MOST_RANGES})
    assert len(list(Lines().feed(most))) == 1
    refused: list[Any] = [
        [[-1, 1]],
        [[True, 1]],
        [[0, 1e9]],
        [[0]],
        [0, 1],
        [{}],
        {},
        5,
        None,
        [[0, 1]] * (MOST_RANGES + 1),
    ]
    for wrong in refused:
        with pytest.raises(ValueError, match="range"):
            ranges_of({"ranges": wrong}, 16384)
