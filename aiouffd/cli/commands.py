"""The click group. It imports a command's module when that command is needed, since each needs another extra."""

from __future__ import annotations

import importlib
from typing import NoReturn

import click

import aiouffd

__all__ = ["group"]

_COMMANDS = {
    "cache": ("aiouffd.cli.cache", "store"),
    "ctl": ("aiouffd.cli.ctl", "cli"),
    "demo": ("aiouffd.cli.demo", "demo"),
    "doctor": ("aiouffd.cli.doctor", "cli"),
    "lazy-pages": ("aiouffd.cli.lazy_pages", "cli"),
    "report": ("aiouffd.cli.report", "cli"),
    "serve": ("aiouffd.cli.serve", "serve"),
    "snapshot": ("aiouffd.cli.snapshot", "cli"),
    "top": ("aiouffd.cli.top", "cli"),
    "trace": ("aiouffd.cli.traces", "cli"),
}
"""Name of a command -> the module whose `command` it is, and the extra that the module needs."""


class _Commands(click.Group):
    """A group whose commands are in `_COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; return one that names the missing extra where the import fails."""
        if cmd_name not in _COMMANDS:
            return None
        module, extra = _COMMANDS[cmd_name]
        try:
            command: click.Command = importlib.import_module(module).command
        except ImportError as error:
            return _unavailable(cmd_name, f"{error}. `{cmd_name}` needs an extra: pip install 'aiouffd[{extra}]'")
        return command


def _unavailable(name: str, reason: str) -> click.Command:
    def fail(**_: object) -> NoReturn:
        raise click.ClickException(reason)

    return click.Command(
        name,
        callback=fail,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        help=f"Not available: {reason}",
    )


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(aiouffd.__version__, prog_name="aiouffd")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def group(*, debug: bool) -> None:
    """Memory that fills itself on first touch: Linux userfaultfd for Python."""
