"""The command line and the commands of README.md, as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(*command: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command with a deadline."""
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == status, (result.stdout, result.stderr)
    return result


def aiouffd(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return run(
        sys.executable, "-c", "import sys; from aiouffd.cli import main; sys.exit(main())", *arguments, status=status
    )


def test_doctor() -> None:
    """Every feature with its Linux release, and the verdict."""
    output = aiouffd("doctor").stdout
    verdict = "Monitor(), with its defaults   can run"
    for words in ("EVENT_FORK", "4.11", "MOVE", "6.8", "syscall", "user-mode-only", "KVM", verdict):
        assert words in output


@pytest.mark.parametrize("arguments", [("demo", "--size", "many"), ("nonsense",), ("demo", "--threads", "0")])
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    """And a sentence, no traceback."""
    result = aiouffd(*arguments, status=2)
    assert "Traceback" not in result.stderr
    assert result.stderr


def test_version() -> None:
    """It is the package's."""
    import aiouffd as package

    assert package.__version__ in aiouffd("--version").stdout


# The README


def readme_command(name: str) -> str:
    """Return the command that stands behind its marker."""
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_readme_commands_do_all_the_setup() -> None:
    """Each makes an environment and installs the extra that it runs; CI takes them from there."""
    for name, program in (("demo", "aiouffd demo"), ("tests", "pytest")):
        command = readme_command(name)
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
        assert command.endswith(program)
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
