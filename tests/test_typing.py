"""The types, as pyright sees them: `tests/typing/` in its strict mode, and the package's names. mypy runs beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def pyright(*arguments: str) -> dict[str, Any]:
    """Return what it reports. It looks for packages where the `python` of PATH has them."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [sys.executable, "-m", "pyright", "--outputjson", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, check=False)
    assert done.stdout, done.stderr.decode()
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_the_interface_is_accepted_and_refused_in_strict_mode() -> None:
    """Each line with `type: ignore` is refused: one that is not needed is an error, as for mypy."""
    report = pyright()
    assert report["summary"]["filesAnalyzed"]
    assert [(item["range"]["start"]["line"] + 1, item["message"]) for item in report["generalDiagnostics"]] == []


def test_each_public_name_has_a_type() -> None:
    """In all modules, each parameter, result and attribute of public names."""
    report = pyright("--verifytypes", "aiouffd", "--ignoreexternal")["typeCompleteness"]
    assert report["exportedSymbolCounts"]["withKnownType"] > 3000
    assert report["exportedSymbolCounts"] | {"withKnownType": 0} == dict.fromkeys(report["exportedSymbolCounts"], 0), {
        f"{item['file']}:{item['range']['start']['line'] + 1}: {item['message']}"
        for symbol in report["symbols"]
        for item in symbol["diagnostics"]
        if item["severity"] == "error"
        and "range" in item
        and "partially" not in item["message"]  # that follows from others
    }
