"""`python -m aiouffd.native`: the native part is compiled where its files lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from aiouffd.native import build

NOWHERE = "/nonexistent/cc"


def test_the_command(tmp_path: Path) -> None:
    """`python -m aiouffd.native` compiles where the files lie, and ends with the compiler's words if that fails."""
    package = tmp_path / "aiouffd"
    (package / "native").mkdir(parents=True)
    here = Path(build.HERE)
    for path in (here.parent / "errors.py", here.parent / "ranges.py", *here.iterdir()):
        if path.suffix in (".py", ".c", ".h"):
            (package / path.relative_to(here.parent)).write_bytes(path.read_bytes())
    (package / "__init__.py").touch()
    command = [sys.executable, "-m", "aiouffd.native"]
    refused = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "CC": NOWHERE}, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert NOWHERE in refused.stderr
    assert not (package / "native" / build.NAME).exists()
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (package / "native" / build.NAME).exists()
