"""The example that trains a network, where PyTorch is installed."""

from __future__ import annotations

import pytest
from ran import goes_on


def test_example_checkpoint_training() -> None:
    """A training that is killed while it writes checkpoints goes on to the same end."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    goes_on("checkpoint_training.py")
