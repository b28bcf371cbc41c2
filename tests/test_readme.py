"""README.md's table of the kernel interface: complete, and each row's module and test are there."""

from __future__ import annotations

import errno
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from aiouffd.kernel import abi
from aiouffd.kernel.abi import FEATURE_SINCE, Feature, Ioctl

ROOT = Path(__file__).parent.parent
HEAD = "| operation or feature | since Linux | module | test |\n| --- | --- | --- | --- |\n"


@attrs.frozen
class Row:
    """One of the table's."""

    what: str
    since: str
    module: str
    test: str

    @property
    def name(self) -> str:
        """The kernel's word for it: what stands in the first backquotes."""
        return self.what.split("`")[1]


def parsed() -> list[Row]:
    """Return the table's rows; each has four cells, the last two of them code."""
    section = (ROOT / "README.md").read_text().partition("\n## The kernel interface\n")[2].partition("\n## ")[0]
    lines = section.partition(HEAD)[2].partition("\n\n")[0].splitlines()
    rows = []
    for line in lines:
        found = re.fullmatch(r"\| (.+?) \| (.+?) \| `(\S+)` \| `(\S+)` \|", line)
        assert found is not None, f"not a row: {line}"
        rows.append(Row(*found.groups()))
    return rows


ROWS = parsed()


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """The node ids of the tests that CI runs, those for the night left out, with their parameters and without."""
    files = sorted({row.test.partition("::")[0] for row in ROWS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    ids = {line for line in result.stdout.splitlines() if "::" in line}
    return ids | {line.partition("[")[0] for line in ids}


def test_each_rows_module_exists() -> None:
    """It can be imported."""
    assert [row.module for row in ROWS if importlib.util.find_spec(row.module) is None] == []


def test_each_rows_test_runs_in_ci(collected: set[str]) -> None:
    """It is collected, by the node id that the row gives."""
    assert [row.test for row in ROWS if row.test not in collected] == []


def test_each_feature_has_a_row() -> None:
    """Every member, with its bit and the release that `FEATURE_SINCE` names; no other."""
    rows = {row.name: row for row in ROWS if row.name.startswith("Feature.")}
    assert set(rows) == {f"Feature.{feature.name}" for feature in Feature}
    for feature in Feature:
        row = rows[f"Feature.{feature.name}"]
        assert row.since == FEATURE_SINCE[feature]
        assert re.search(rf"bit {feature.bit_length() - 1}\b", row.what), row


def test_each_operation_has_a_row() -> None:
    """Every member of Ioctl; no other."""
    found = {row.name for row in ROWS if row.name.startswith("UFFDIO_")}
    assert found == {f"UFFDIO_{operation.name}" for operation in Ioctl}


def test_each_event_has_a_row() -> None:
    """Every event of `abi`; no other."""
    known = {name for name in vars(abi) if name.startswith("EVENT_")}
    assert {row.name for row in ROWS if row.name.startswith("UFFD_EVENT_")} == {f"UFFD_{name}" for name in known}


def test_each_errno_has_a_row() -> None:
    """What ioctl_userfaultfd(2) and userfaultfd(2) list; EAGAIN in its two meanings."""
    found = sorted(row.name for row in ROWS if hasattr(errno, row.name))
    expected = [
        "EAGAIN",
        "EBUSY",
        "EEXIST",
        "EFAULT",
        "EINVAL",
        "ENOENT",
        "ENOMEM",
        "ENOSPC",
        "ENOSYS",
        "EPERM",
        "ESRCH",
    ]
    assert found == sorted([*expected, "EAGAIN"])


def test_the_other_ways_in_have_rows() -> None:
    """The device, user mode only, and the call that finds what was written."""
    assert {"/dev/userfaultfd", "UFFD_USER_MODE_ONLY", "PAGEMAP_SCAN"} <= {row.name for row in ROWS}
