"""The example that trains a network, where PyTorch is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from ran import EXAMPLES, goes_on

if TYPE_CHECKING:
    from pathlib import Path


def test_example_checkpoint_training() -> None:
    """A training that is killed while it writes checkpoints goes on to the same end."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    goes_on("checkpoint_training.py")


def test_without_pytorch(tmp_path: Path) -> None:
    """One sentence says what to install."""
    if importlib.util.find_spec("torch") is not None:
        pytest.skip("PyTorch is installed")
    command = [sys.executable, str(EXAMPLES / "checkpoint_training.py"), str(tmp_path / "layers")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 2
    assert result.stderr.endswith("error: PyTorch is not installed: pip install torch\n")
