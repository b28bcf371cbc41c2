"""Cases by the thousand, drawn from a generator of random numbers: at a tenth of what hypothesis takes for each.

For inputs that are short as they are drawn: one that fails is told with its seed, and is not shrunk.
"""

from __future__ import annotations

import contextlib
import os
import random
from typing import TYPE_CHECKING, TypeVar

from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["bytes_by_chance", "cases", "shortened"]

T = TypeVar("T")


def cases(count: int, draw: Callable[[random.Random], T], stream: int = 0) -> Iterator[AbstractContextManager[T]]:
    """Draw so many cases, each a block's; one whose block raises is told. AIOUFFD_TEST_SEED chooses which.

    There are far fewer, and always the same, where the profile of hypothesis asks for that. Each `stream` has its own.
    """
    profile = settings.default
    assert profile is not None
    count = count * profile.max_examples**2 // 100**2
    seed = os.environ.get("AIOUFFD_TEST_SEED") or (0 if profile.derandomize else random.SystemRandom().getrandbits(32))
    rng = random.Random(f"{seed} {stream}")
    for number in range(count):
        yield _told(draw(rng), f"case {number} with AIOUFFD_TEST_SEED={seed}")


@contextlib.contextmanager
def _told(case: T, which: str) -> Iterator[T]:
    try:
        yield case
    except BaseException as error:
        error.add_note(f"{which}: {case!r}")
        raise


def bytes_by_chance(rng: random.Random, most: int, least: int = 0) -> bytes:
    """Draw bytes; half of the time all of them are at a bound of what a byte, or an ASCII letter, may be."""
    size = rng.randint(least, most)
    return rng.randbytes(size) if rng.random() < 0.5 else bytes(rng.choices(b"\x00\x01\x7f\x80\xff", k=size))


def shortened(steps: list[T], check: Callable[[list[T]], object]) -> None:
    """Check some steps; if that fails, raise what is said of the fewest that still fail, leaving out one by one."""
    failure = None
    at = -1  # first with all of them
    while at < len(steps):
        fewer = [*steps[:at], *steps[at + 1 :]] if at >= 0 else steps
        try:
            check(fewer)
        except Exception as error:  # noqa: BLE001 - whatever it is
            steps, failure = fewer, error
            at = max(at, 0)
        else:
            if failure is None:
                return
            at += 1
    assert failure is not None
    failure.add_note(f"by these steps: {steps!r}")
    raise failure
