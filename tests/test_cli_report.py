"""`cli.report`: a page of runs, and of a program's."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from reported import run_of

from aiouffd.cli import main

if TYPE_CHECKING:
    from pathlib import Path

LEAVES = "import os, sys; open(os.environ['AIOUFFD_REPORT'] + '/1-1.json', 'w').write(sys.argv[1]); "


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is written here."""
    monkeypatch.chdir(tmp_path)


def report(*arguments: str) -> int:
    """Run the command."""
    return main(["report", *arguments])


def test_records_become_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files, and what a folder has, in order of their beginning."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for number, began in ((1, "2026-03"), (2, "2026-01")):
        (folder / f"7-{number}.json").write_text(run_of(source=f"S{number}.", began=began).to_json())
    (folder / "other.txt").write_text("is left alone")
    (tmp_path / "one.json").write_text(run_of(source="S3.", began="2026-02").to_json())
    assert report(str(folder), "one.json", "-o", "page.html") == 0
    assert capsys.readouterr().err == "aiouffd: page.html: 3 runs\n"
    text = (tmp_path / "page.html").read_text()
    assert text.index("S2.") < text.index("S3.") < text.index("S1.")


def test_a_program_is_run_and_its_monitors_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its options are its own, and its exit status is passed on."""
    code = LEAVES + "assert sys.argv[2:] == ['-o', '--', '--help']; sys.exit(3)"
    assert report("--", sys.executable, "-c", code, run_of().to_json(), "-o", "--", "--help") == 3
    assert capsys.readouterr().err == "aiouffd: aiouffd-report.html: 1 run\n"
    assert "Far()" in (tmp_path / "aiouffd-report.html").read_text()


@pytest.mark.parametrize(
    ("code", "status"),
    [("0", 1), ("import sys; sys.exit(5)", 5), ("import os; os.kill(os.getpid(), 15)", 128 + 15)],
)
def test_a_program_that_reports_nothing(
    code: str, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Is told so: no page is written."""
    assert report("--", sys.executable, "-c", code) == status
    assert "no Monitor that reports; one with a report= of its own is not" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ((), 2, "give records, or a program behind --"),
        (("bad.json", "--", "true"), 2, "give records, or a program behind --"),
        (("--", "./nothing"), 127, "./nothing: No such file or directory"),
        (("--", "./bad.json"), 126, "./bad.json: Permission denied"),
        (("bad.json",), 1, "bad.json: it is no record of a run"),
        (("absent.json",), 2, "does not exist"),
        (("empty",), 1, "there are no records of runs"),
        (("bad.json", "-o", "no/page.html"), 1, "no/page.html: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: tuple[str, ...], status: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is written."""
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert report(*arguments) == status
    assert text in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "empty"]
