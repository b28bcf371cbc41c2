"""What holds for all tests: loops, the watch over blocking calls and over processes, and the kernel tests' marks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from blocking import loop_factories, no_blocking
from hypothesis import HealthCheck, Phase, settings
from processes import KEPT, adopt_orphans, command_line, default_dispositions, descendants, end_all

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from types import FrameType

    from aiouffd.pager.client.packing import Pack

# What is compiled is kept: else each worker, and each process that tests start, would compile all tests again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A machine that is busy with other work is no defect of a test.
settings.register_profile("aiouffd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("aiouffd")
# For mutation testing, where a test runs thousands of times: fewer examples, always the same, and none is shrunk.
settings.register_profile(
    "mutation",
    settings.get_profile("aiouffd"),
    max_examples=10,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)

TESTS = Path(__file__).parent
KERNEL = TESTS / "kernel"
MODULES = {
    name
    for path in (TESTS.parent / "aiouffd").rglob("*.py")
    if path.parent.name != "cli"  # the report omits it
    for name in (path.stem.strip("_"), path.parent.name, f"{path.parent.name}_{path.stem.strip('_')}")
} - {"serve"}  # the command
"""What the names of test files name."""
_AGAIN = 2.0  # seconds, until a test is told again that its time is up
PASSED = pytest.StashKey[bool]()
LATE = pytest.StashKey[bool]()
FIRST = pytest.StashKey[bool]()
"""Whether a test is the first one of its function, whose others have other parameters."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is collected stays: to look for garbage among 5,000 tests takes a third of a second, each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make what tests start independent of how pytest was started, and know all of it."""
    default_dispositions()
    if not session.config.pluginmanager.hasplugin("dsession"):  # who runs no test leaves orphans of workers to init
        adopt_orphans()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite in two processes for each core, since most tests wait; named tests in this process."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("lf", default=False)
    return 2 * (os.cpu_count() or 1) if whole else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is in tests/kernel needs the kernel; a mutant is tried with the tests of its own module first.

    What is long begins first: whoever is left alone with it at the end leaves a processor idle.
    """
    mutant = os.environ.get("MUTANT_UNDER_TEST", "").replace(".", "_")
    items.sort(key=lambda item: not item.get_closest_marker("long"))
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in mutant)
    functions: set[str] = set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        item.stash[FIRST] = function not in functions
        functions.add(function)
        if KERNEL in item.path.parents:
            item.add_marker("kernel")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember how a test went; in CI a kernel test that does not run has failed."""
    report = yield
    if call.when == "call":
        item.stash[PASSED] = report.passed
    if report.passed and item.stash.get(LATE, False):
        report.outcome = "failed"
        report.longrepr = "its time was up"
    if report.skipped and os.environ.get("CI") == "true" and item.get_closest_marker("kernel") is not None:
        report.outcome = "failed"
        report.longrepr = f"skipped, which in CI is a failure: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item) -> Generator[None, object, object]:
    """Cancel what a loop runs when the time of a test is up, which fails it; raise where no loop runs, or soon after.

    To raise in a signal handler, as the plugin does, ends no loop of uvloop; and where asyncio's is ended so, nothing
    tells what the test was waiting for.
    """
    result = yield
    fails = signal.getsignal(signal.SIGALRM)
    assert callable(fails)

    def time_is_up(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(_cancel, loop)  # which wakes it, unlike call_soon
            if not item.stash.get(LATE, False):
                item.stash[LATE] = True
                return
        fails(number, frame)

    signal.signal(signal.SIGALRM, time_is_up)
    return result


def _cancel(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel("the time of the test is up")


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run each async test on asyncio's loop, and on uvloop where it is installed."""
    return loop_factories()


@pytest.fixture
def pack() -> Iterator[Pack]:
    """A packed source of ours; to close it twice does no harm."""
    import aiouffd  # few tests need it
    from aiouffd.engine.options import Options, Service
    from aiouffd.pager.client import packing

    made = packing.Pack(Service(aiouffd.ZeroSource(mmap.PAGESIZE)), Options())
    yield made
    made.close()
    made.close()


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that each user may look into. `tmp_path` is in one that each run of pytest takes from others."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


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


@pytest.fixture(autouse=True)
def _few_processes_are_measured(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start processes without coverage, as users do, but for the first test of each function that tests a module.

    Each Python process that is measured takes 0.1 s more to start and to end, and runs at half its speed: so those of
    tests that do the same a thousand times are marked `unmeasured`.
    """
    measured = request.path.stem.removeprefix("test_") in MODULES and request.node.stash.get(FIRST, True)
    measured = measured and request.node.get_closest_marker("unmeasured") is None
    asked = [] if measured else [name for name in os.environ if name.startswith("COVERAGE_PROCESS")]
    kept = {name: os.environ.pop(name) for name in asked}
    yield
    os.environ.update(kept)


@pytest.fixture(autouse=True)
def _nothing_was_said_yet() -> None:
    """Forget what other tests have had warned of."""
    if (repeated := sys.modules.get("aiouffd.sources.repeated")) is not None:
        repeated._times.clear()


@pytest.fixture(autouse=True)
def _no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave no process of a test: one that failed has its processes killed, one that passed must have ended them."""
    before = descendants(os.getpid())
    yield
    passed = request.node.stash.get(PASSED, False)
    left = {pid: command_line(pid) for pid in descendants(os.getpid()) - before - KEPT}
    killed = end_all(before, patience=5.0 if passed else 0.0)
    assert not (passed and killed), f"it has left processes: {[(pid, left.get(pid)) for pid in killed]}"
