"""`python -m aiouffd`: the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["no-such-command"], 2)])
def test_the_module_is_the_command_line(arguments: list[str], status: int) -> None:
    """Its exit status is the command's."""
    command = [sys.executable, "-m", "aiouffd", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == status
    assert "demo" in result.stdout + result.stderr or "no-such-command" in result.stderr
