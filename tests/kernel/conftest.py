"""What kernel tests need of the machine, put back afterwards."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TYPE_CHECKING

import criu_rig
import debian_packages
import pytest
from pattern import PAGE, word

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Six huge pages, for the time of a test; one test at a time, or each would put back what the other had set."""
    knob = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    if not knob.exists():
        pytest.skip("this kernel has no huge pages of 2 MiB")
    with knob.open() as file:  # closing it gives the lock back, also when pytest is killed
        fcntl.flock(file, fcntl.LOCK_EX)
        yield from _six_more(knob)


def _six_more(knob: Path) -> Iterator[None]:
    before = knob.read_text()
    more = str(int(before) + 6)
    try:
        knob.write_text(more)
    except OSError:
        pytest.skip("huge pages cannot be reserved by this user")
    try:
        if knob.read_text().strip() != more:  # memory that is in use is in pieces: have the kernel move them together
            Path("/proc/sys/vm/compact_memory").write_text("1")
            knob.write_text(more)
        if int(knob.read_text()) < int(more):
            pytest.skip("no room for huge pages")
        yield
    finally:
        knob.write_text(before)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[criu_rig.Checkpoint]:
    """A process to be checkpointed by a real CRIU, and killed at the end whatever became of it."""
    try:
        criu_rig.command()
        criu_rig.subject_program()
        with criu_rig.large_pipes(), criu_rig.Checkpoint(tmp_path) as one:
            yield one
    except debian_packages.UnobtainableError as error:
        pytest.skip(str(error))


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """A name of `kinds.MAKERS`, given by an indirect parameter: where it is one of huge pages, there are some."""
    name: str = request.param
    if name.startswith("hugetlb"):
        request.getfixturevalue("huge_pages")
    return name


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of 16 MiB, in which page n consists of words n + 1."""
    path = tmp_path / "memory.bin"
    path.write_bytes(b"".join(word(page) * (PAGE // 8) for page in range((16 << 20) // PAGE)))
    return path
