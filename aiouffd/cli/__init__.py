"""The command line: a module for each command. Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.

Layout: `commands` (the group) > `serve`, `lazy_pages`, `doctor`, `demo` (`demo_parts`, `demo_store`, `demo_server`)
> `daemon` (signals, log, systemd) > `parameters` (types of options).
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from aiouffd.errors import UffdError
from aiouffd.kernel.limits import limit_error, no_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "run"]


def run() -> NoReturn:
    """Run the command line and end this process; the console script's entry point."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a command has ended what it began: to finalize Python takes 10 to 20 ms, for nothing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        import click  # noqa: PLC0415 - an extra

        from aiouffd.cli import commands  # noqa: PLC0415 - needs the extra
    except ImportError as error:
        _say(f"{error}. The command line needs an extra: pip install 'aiouffd[cli]'")
        return 2
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        result: Any = commands.group.main(args=arguments, prog_name="aiouffd", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return 130
    except Exception as error:
        text = _sentence(error)
        if debug or not text:
            raise
        _say(text)
        return 1
    return int(result or 0)


def _sentence(error: Exception) -> str:
    """Return what an error that is no bug says to a user; empty: it may be one."""
    if isinstance(error, UffdError):
        return str(error)
    if isinstance(error, OSError):
        known = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return str(limit_error(str(error.filename or "the command"), error.errno or 0) or known)
    if isinstance(error, MemoryError):
        return str(limit_error("the command", errno.ENOMEM))
    return str(no_thread("a thread of the command")) if str(error) == "can't start new thread" else ""


def _say(text: str) -> None:
    sys.stderr.write(f"aiouffd: {text}\n")
