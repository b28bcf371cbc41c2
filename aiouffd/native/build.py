"""Compiles the C files of this directory into one shared object.

The build hook runs this when aiouffd is installed, before there is an `aiouffd` to import, so it uses the standard
library only. The object has no Python.h and links with libc alone: one build serves each version of Python. `CC` may
be any command, a cross compiler for example: `CC="python -m ziglang cc -target aarch64-linux-gnu.2.17"`.
"""

from __future__ import annotations

import os
import subprocess
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

HERE = os.path.dirname(__file__)  # noqa: PTH120 - each program imports this, and few need pathlib
NAME = "libaiouffd.so"
FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra")


class BuildError(Exception):
    """There is no C compiler, or it failed."""


def sources(suffix: str = ".c") -> list[str]:
    """Return the paths of the C files."""
    names = sorted(name for name in os.listdir(HERE) if name.endswith(suffix))  # noqa: PTH208 - as above
    return [f"{HERE}/{name}" for name in names]


def fingerprint() -> int:
    """Return a checksum of the C files. It is compiled in, so that a build that is out of date is found."""
    value = 0
    for path in (*sources(), *sources(".h")):
        with open(path, "rb") as file:  # noqa: PTH123 - as above
            value = zlib.crc32(file.read(), value)
    return value


def compiler() -> list[str]:
    """Return the command of the C compiler: that of CC, else the first of cc, gcc and clang that exists."""
    import shlex  # noqa: PLC0415 - each program checks the build, and few make one
    import shutil  # noqa: PLC0415 - likewise; it brings compressors

    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]) is not None:
            return command
    raise BuildError(
        f"no C compiler: CC={named[0]!r} is not there" if named else "no C compiler: neither cc, gcc nor clang"
    )


def build(output: Path, *flags: str) -> None:
    """Compile to `output`, which is replaced atomically: a program that runs keeps the old file.

    Raises:
        BuildError: there is no compiler, or it failed; the message has its output.
    """
    fresh = output.with_name(f".{output.name}.{os.getpid()}")
    command = [*compiler(), *FLAGS, *flags, f"-DAIOUFFD_FINGERPRINT={fingerprint()}u", "-o", str(fresh), *sources()]
    line = " ".join(command)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)  # noqa: S603
        fresh.replace(output)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{line} failed:\n{error.stderr}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{line} failed: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)
