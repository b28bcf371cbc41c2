"""Marks the kernel tests, makes a skip of one a failure in CI, and runs async tests on each loop, watched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from blocking import loop_factories, no_blocking
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator, Iterator

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


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run each async test on asyncio's loop, and on uvloop where it is installed."""
    return loop_factories()


@pytest.fixture(params=loop_factories())
def loop(request: pytest.FixtureRequest) -> str:
    """Run a test whose loop is in a child process once for each loop: the name, for `scenario.play`."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def _no_blocking(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail an async test in which code of the package blocks the loop."""
    if not pytest_asyncio.is_async_test(request.node):
        yield
        return
    with no_blocking():
        yield
