"""`engine.serve.bounds`: how much at once, how long, how often again."""

from __future__ import annotations

from typing import Any

import pytest

from aiouffd.engine.serve.bounds import Limits


@pytest.mark.parametrize(
    "wrong", [{"concurrent_reads": 0}, {"bytes_in_flight": 0}, {"timeout": 0}, {"timeout": -1.0}, {"retries": -1}]
)
def test_limits_that_nothing_could_pass(wrong: dict[str, Any]) -> None:
    """Are refused where they are made."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)
    assert Limits(timeout=None, retries=0, concurrent_reads=1, bytes_in_flight=1).timeout is None
    assert Limits() == Limits(128, 128 << 20, 30.0, None, 0.05)
