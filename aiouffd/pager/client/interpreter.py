"""Which command starts a pager: a Python interpreter that has aiouffd."""

from __future__ import annotations

import os
import sys

from aiouffd.errors import PagerStartError

__all__ = ["SWITCH", "command"]

SWITCH = "AIOUFFD_PYTHON"
"""In the environment: the interpreter that pagers run in, where `sys.executable` is none."""


def command() -> list[str]:
    """Return the interpreter and its options; the module to run follows.

    A frozen application (PyInstaller and the like) and a program that embeds Python have their own program as
    `sys.executable`, or nothing. That program would start itself again instead of a pager, and so on without end.

    Raises:
        PagerStartError: no interpreter is known.
    """
    python = os.environ.get(SWITCH) or _own()
    # -P: the working directory is not put in front of sys.path. What this interpreter does not look at, the pager's
    # does not look at either.
    options = ["-I"] if sys.flags.isolated else ["-E"] * sys.flags.ignore_environment + ["-s"] * sys.flags.no_user_site
    return [python, "-P", *options]


def _own() -> str:
    if getattr(sys, "frozen", False):
        reason = f"this program is frozen, and {sys.executable!r} is the program itself"
    elif not sys.executable:
        reason = "this program embeds Python, and sys.executable is empty"
    elif not _is_python(sys.executable):
        reason = f"{sys.executable!r} does not look like a Python interpreter: this program embeds Python"
    else:
        return sys.executable
    raise PagerStartError(
        f"no interpreter to run the pager in: {reason}. Set {SWITCH} to a Python {sys.version_info[0]}."
        f"{sys.version_info[1]} that has aiouffd installed, or use engine=aiouffd.InThread(), which starts no process"
    )


def _is_python(path: str) -> bool:
    """Tell by its name whether a program is an interpreter: to run it to find out might start the application."""
    names = {os.path.basename(path), os.path.basename(os.path.realpath(path))}  # noqa: PTH119 - names, not paths
    return any("python" in name.lower() or name.lower().startswith("pypy") for name in names)
