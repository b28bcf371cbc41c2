"""The documents: the table of the kernel interface is complete and proven, and what they name exists."""

from __future__ import annotations

import errno
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import attrs
import click
import pytest

import aiouffd
from aiouffd.cli.commands import group
from aiouffd.engine.statistics import Counters
from aiouffd.kernel import abi
from aiouffd.kernel.abi import FEATURE_SINCE, Feature, Ioctl
from aiouffd.report.measures import MEASURES
from aiouffd.report.page import page
from aiouffd.report.run import Run
from aiouffd.server.metrics import Metrics
from tools import picture

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
HEAD = "| operation or feature | since Linux | module | test |\n| --- | --- | --- | --- |\n"


@attrs.frozen
class Row:
    """A row of the table."""

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
    lines = (ROOT / "docs" / "reference" / "kernel.md").read_text().partition(HEAD)[2].partition("\n\n")[0].splitlines()
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


# All documents


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_each_link_leads_somewhere(document: Path) -> None:
    """Files and headings of this repository; addresses elsewhere are not asked."""
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_each_path_exists(document: Path) -> None:
    """Files that are named as code: from the root, or from the package. The changelog may name files that were."""
    names = re.findall(r"`([\w./]+/[\w./]*|[\w/]+\.(?:py|md|c|h))`", document.read_text())
    missing = [name for name in names if not name.startswith("/") and not exists(name)]
    assert missing == []


def exists(name: str) -> bool:
    """Tell whether a path is there, below the root or below the package."""
    return any((start / name).exists() for start in (ROOT, ROOT / "aiouffd"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_each_option_of_a_command_exists(document: Path) -> None:
    """`aiouffd COMMAND --option`, in blocks of shell code."""
    for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL):
        for name, rest in re.findall(r"^(?:.*/)?aiouffd ([a-z-]+)(.*?)(?:\s#.*)?$", block, re.MULTILINE):
            command = group.get_command(None, name)  # type: ignore[arg-type]  # it needs no context
            assert command is not None, name
            if isinstance(command, click.Group):
                command = command.commands[rest.split()[0]]
            known = {option for parameter in command.params for option in parameter.opts}
            assert set(re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", rest)) <= known


def test_each_public_name_that_is_used_exists() -> None:
    """`aiouffd.Name` and `aiouffd.module`; and spans, steps and metrics of OpenTelemetry."""
    code = "".join(path.read_text() for path in (ROOT / "aiouffd").rglob("*.py"))
    told = {*re.findall(r'"aiouffd\.(\w+)"', code), *re.findall(r'noted\("(\w+)"', code)}
    told |= {word for each in MEASURES for word in (each.path.partition(".")[0], each.label)}
    for document in DOCUMENTS:
        for name in re.findall(r"(?<!/)aiouffd\.([A-Za-z_]+)", document.read_text()):
            there = name in told or hasattr(aiouffd, name) or importlib.util.find_spec(f"aiouffd.{name}")
            assert there, name


def test_each_public_name_is_in_the_reference() -> None:
    """Autodoc writes its entry from the docstring."""
    pages = "".join(path.read_text() for path in ROOT.glob("docs/reference/**/*.md"))
    shown = re.findall(r"^\.\. auto\w+:: aiouffd\.(\w+)(?:\(.*\))?$", pages, re.MULTILINE)
    assert sorted(shown) == sorted(aiouffd.__all__)


def test_each_error_is_explained() -> None:
    """docs/reference/errors.md names each public exception in its tables."""
    text = (ROOT / "docs" / "reference" / "errors.md").read_text()
    public = [getattr(aiouffd, name) for name in aiouffd.__all__]
    errors = [one.__name__ for one in public if isinstance(one, type) and issubclass(one, Exception)]
    assert [name for name in errors if f"`{name}`" not in text and f"aiouffd.{name}`" not in text] == []


def test_the_metrics_are_those_of_the_server() -> None:
    """Names, kinds, texts and the values of labels."""
    rows = []
    for metric in Metrics(Counters().snapshot, lambda: 0).collect():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        labels = [pair for sample in metric.samples for pair in sample.labels.items() if pair[0] != "le"]
        values = f": {', '.join(f'`{value}`' for _, value in labels)}" if labels else ""
        rows.append(f"| `{name}{{{labels[0][0]}}}`" if labels else f"| `{name}`")
        rows[-1] += f" | {metric.type} | {metric.documentation}{values} |"
    text = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows


def test_each_example_is_listed() -> None:
    """By what a reader wants to do."""
    text = (ROOT / "docs" / "how-to" / "examples.md").read_text()
    examples = [path.name for path in (ROOT / "examples").rglob("*.*") if "__pycache__" not in path.parts]
    assert [name for name in examples if f"/{name})" not in text] == []


def test_readme_is_short() -> None:
    """It says what, why and how to try it; the rest is in docs/, whose index names all pages."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    index = (ROOT / "docs" / "index.md").read_text().splitlines()
    pages = [path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert [page for page in pages if page not in index] == ["index"]


def test_the_picture_is_what_its_script_draws() -> None:
    """It is drawn again when the script is changed: python tools/picture.py."""
    assert picture.TARGET.read_text() == picture.draw()


def test_the_report_is_what_the_command_writes() -> None:
    """It is written again when a page changes: aiouffd report docs/report.json -o docs/_static/report.html."""
    run = Run.from_json((ROOT / "docs" / "report.json").read_bytes())
    assert (ROOT / "docs" / "_static" / "report.html").read_text() == page([run])
