"""`sources.steps`: what is noted, by whom, and what it says of a wait."""

from __future__ import annotations

import asyncio

import pytest

from aiouffd.sources.steps import Step, begin, cause_of, current, noted, spent


async def test_tasks_note_where_the_one_that_began_them_does() -> None:
    """Each flight has a list of its own; who has none notes nothing."""

    async def reads(name: str) -> None:
        noted(name, 0)

    async def flight(name: str) -> list[str]:
        steps = begin()
        assert current() is steps
        await asyncio.gather(reads(name), asyncio.to_thread(noted, f"{name} in a thread", 0))
        return [step[0] for step in steps]

    await reads("nobody")
    found = await asyncio.gather(*map(flight, ("one", "other")))
    assert [sorted(each) for each in found] == [["one", "one in a thread"], ["other", "other in a thread"]]
    assert current() is None
    given: list[Step] = []
    noted("queue", 5, given, count=3)
    ((name, began, ended, details),) = given
    assert (name, began, details, ended > 5) == ("queue", 5, {"count": 3}, True)


@pytest.mark.parametrize(
    ("since", "cause"), [(0, "source"), (10, "queue"), (40, "retry"), (66, "decompress"), (95, "source")]
)
def test_the_cause_is_what_took_most_of_the_wait(since: int, cause: str) -> None:
    """From when a thread has waited on: what was before is not its wait. What has others in it is no cause."""
    steps: list[Step] = [
        ("queue", 10, 40, {}), ("read", 40, 100, {}), ("retry", 42, 66, {}),
        ("chunk", 66, 100, {}), ("decompress", 67, 75, {}), ("decompress", 75, 85, {}),
    ]  # fmt: skip
    assert cause_of(steps, since, 100 if since else 400) == cause
    assert spent(steps, "queue", 30) == 10
    assert spent(steps, "queue", 50) == 0
