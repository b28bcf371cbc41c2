"""Marks the kernel tests, and makes a skip of one a failure in CI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Generator

# A machine that is busy with other work is no defect of a test.
settings.register_profile("aiouffd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("aiouffd")

KERNEL = Path(__file__).parent / "kernel"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is in tests/kernel needs the kernel."""
    for item in items:
        if KERNEL in item.path.parents:
            item.add_marker("kernel")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a kernel test that does not run has failed."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and item.get_closest_marker("kernel") is not None:
        report.outcome = "failed"
        report.longrepr = f"skipped, which in CI is a failure: {report.longrepr}"
    return report
