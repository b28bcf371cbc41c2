"""`monitor.held`: who keeps a region."""

from __future__ import annotations

import pytest

import aiouffd
from aiouffd.monitor.held import Held


def test_a_region_is_kept_until_it_is_released() -> None:
    """And found from then on as long as somebody else keeps it."""
    region = aiouffd.Region(4096)
    address, held = region.address, Held(region)
    del region
    assert held.region.address == address
    user = held.region
    held.release()
    assert held.region is user
    assert repr(held) == repr(user)
    del user
    with pytest.raises(aiouffd.ClosedError, match="nobody has kept it"):
        _ = held.region
    assert repr(held) == "a region that is gone"


def test_a_finalizer_keeps_it_again() -> None:
    """What is found after that is the same region."""
    region = aiouffd.Region(4096)
    held = Held(region)
    held.release()
    held.keep(region)
    address = region.address
    del region
    assert held.region.address == address
