"""`report.run`: the figures of a run, and their file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported import MIB, run_of

from aiouffd.report.run import COLUMNS, Run, waited_ns

RUN = run_of(
    {"faults": [3, 0, 4], "source_retries": [1, 2, 0]},
    faults=7,
    latency={20: 7},
    resident=MIB,
    film=[(0.0, [0, 100]), (1.5, [7])],
    cache={"hits": 3},
    errors=["<b>"],
)


def test_it_comes_back_from_its_file() -> None:
    """As it was; the text is JSON."""
    text = RUN.to_json()
    assert Run.from_json(text) == Run.from_json(text.encode()) == RUN
    assert json.loads(text)["statistics"]["faults"] == 7
    assert str(RUN) == "Far(): 7 faults, 1.0 MiB of 64.0 MiB"


def test_a_later_version_of_this_library_counts_less_or_a_word_less_is_nothing() -> None:
    """A counter that the file lacks is 0; one that is unknown is refused."""
    values = json.loads(RUN.to_json())
    del values["statistics"]["joined"]
    assert Run.from_json(json.dumps(values)) == RUN
    values["statistics"]["invented"] = 1
    with pytest.raises(ValueError, match=r"damaged: .*invented"):
        Run.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        *(("", "no record"), ("[]", "no record"), ("{}", "no record"), ("[" * 10**5, "no record"), (b"\xff", "no rec")),
        *(('{"aiouffd run": 9}', "its version is 9; this library reads version 1"), ('{"aiouffd run": 1}', "damaged")),
    ],
)
def test_what_is_no_record_is_refused(text: str | bytes, what: str) -> None:
    """And said to be none."""
    with pytest.raises(ValueError, match=what):
        Run.from_json(text)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to each value of a document."""
    found = [path] if path else []
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(part, (*path, key))
    return found


WRONG = st.sampled_from([None, -1, 1 << 64, float("nan"), float("inf"), [], [1, "x"], {}, {"x": 1}, [[-1]], True])


@given(st.sampled_from(places(json.loads(RUN.to_json()))), WRONG)
def test_a_damaged_file_is_refused_or_sound(path: tuple[Any, ...], wrong: Any) -> None:
    """Whatever is put in place of a value: a ValueError, or a run that can be written again."""
    values = json.loads(RUN.to_json())
    part = values
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = wrong
    try:
        run = Run.from_json(json.dumps(values))
    except ValueError as error:
        assert "damaged" in str(error) or "version" in str(error)  # noqa: PT017 - both are right
    else:
        assert Run.from_json(run.to_json()) == run
        assert all(len(row) == len(COLUMNS) for row in run.rows)


def test_outages_are_where_reads_failed() -> None:
    """A pause between two tries is part of one; a read that failed for good counts, too."""
    run = run_of({"source_retries": [1, 0, 2, *[0] * 30], "source_errors": [*[0] * 29, 1, 0, 0, 0]})
    assert run.outages() == [(0.0, pytest.approx(0.3)), (pytest.approx(2.9), 3.0)]
    assert run_of().outages() == []


def test_the_wait_is_about_what_the_buckets_say() -> None:
    """The middle of each."""
    assert waited_ns(run_of(latency={10: 4, 20: 1}).statistics) == 4 * 768 + 786432
