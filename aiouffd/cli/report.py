"""`aiouffd report`: one HTML page of what runs were like."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aiouffd.report.output import check, write
from aiouffd.report.page import page
from aiouffd.report.run import Run
from aiouffd.report.words import several

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["command"]

_NOT_FOUND, _NOT_EXECUTABLE, _SIGNAL = 127, 126, 128  # exit statuses, as those of a shell


class _Command(click.Command):
    """Leaves what stands behind `--` alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the program apart."""
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[__name__] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return the words of the usage line."""
        return [*super().collect_usage_pieces(ctx), "[-- PROGRAM...]"]


@click.command("report", cls=_Command)
@click.argument("records", nargs=-1, type=click.Path(exists=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    default="aiouffd-report.html",
    show_default=True,
    help="The page to write.",
)
@click.pass_context
def command(ctx: click.Context, records: tuple[str, ...], output: str) -> int:
    """Write a page that shows what runs of Monitors were like, and says what could be better.

    RECORDS are the files of Monitor(report="run.json"), or folders of them (AIOUFFD_REPORT). With `-- PROGRAM...`, a
    program is run, and each of its Monitors reports, those of its child processes too; its exit status is passed on.
    """
    program: list[str] = ctx.meta[__name__]
    if bool(program) == bool(records):
        raise click.UsageError("give records, or a program behind --: aiouffd report -- python program.py")
    target = check(output)
    with tempfile.TemporaryDirectory(prefix="aiouffd-report-") as folder:
        status = _run(program, folder) if program else 0
        runs = list(_runs([folder] if program else records))
    if not runs:
        nothing = "the program has left no Monitor that reports; one with a report= of its own is not in this page"
        text = nothing if program else "there are no records of runs"
        click.echo(f"aiouffd: {text}", err=True)
        return status or 1
    write(target, page(runs))
    click.echo(f"aiouffd: {output}: {several(len(runs), 'run')}", err=True)
    return status


def _run(program: list[str], folder: str) -> int:
    """Run a program whose Monitors report to a folder; return its exit status."""
    try:
        process = subprocess.Popen(program, env={**os.environ, "AIOUFFD_REPORT": folder})  # noqa: S603 - the user's own
    except OSError as error:
        click.echo(f"aiouffd: {program[0]}: {error.strerror}", err=True)
        raise click.exceptions.Exit(_NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE) from None
    while process.returncode is None:
        with contextlib.suppress(KeyboardInterrupt):  # it has got the signal as well
            process.wait()
    return process.returncode if process.returncode >= 0 else _SIGNAL - process.returncode


def _runs(records: Iterable[str]) -> Iterable[Run]:
    """Return the runs of files and folders, in order of their beginning."""
    runs = []
    for record in map(Path, records):
        for path in sorted(record.glob("*.json")) if record.is_dir() else [record]:
            try:
                runs.append(Run.from_json(path.read_bytes()))
            except ValueError as error:
                raise click.ClickException(f"{path}: {error}") from None
    return sorted(runs, key=lambda run: run.facts.began)
