"""Runs the page server of the examples as a process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_SERVER = Path(__file__).parent.parent / "examples" / "page_server.py"


@contextlib.contextmanager
def serving(directory: Path, *options: str) -> Iterator[str]:
    """Serve the files of a directory; yield the URL of the directory."""
    command = [sys.executable, str(PAGE_SERVER), "--directory", str(directory), "--until-eof", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()
