"""What kernel tests need of the machine, put back afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Four huge pages, for the time of a test."""
    knob = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = knob.read_text()
    try:
        knob.write_text(str(int(before) + 4))
    except OSError:
        pytest.skip("huge pages cannot be reserved by this user")
    try:
        if int(knob.read_text()) < int(before) + 4:
            pytest.skip("no room for huge pages")
        yield
    finally:
        knob.write_text(before)
