"""The examples, run as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["EXAMPLES", "example", "goes_on"]

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str, *arguments: str | Path) -> str:
    """Run an example; return its output."""
    command = [sys.executable, *map(str, (EXAMPLES / name, *arguments))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, (result.stdout, result.stderr)
    assert "Warning" not in result.stderr
    return result.stdout


def goes_on(name: str) -> None:
    """Run one that is killed while it writes checkpoints, and ends as it would have without."""
    output = example(name)
    assert "killed: True" in output
    assert re.search(r"goes on from \d+.snap, behind step \d+\nafter \d+ steps the last layer is right\n", output)
