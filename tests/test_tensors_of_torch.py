"""`formats.load_file` gives the tensors that the package safetensors does; where PyTorch is installed."""

from __future__ import annotations

import numpy as np
import pytest
from array_files import tensors
from scenario import play

from aiouffd import formats

MODEL = {f"w{n}": np.full((100, 777), n, np.float32) for n in range(64)}
FILE = tensors(MODEL, dict.fromkeys(MODEL, "F32"))


def of_torch() -> None:
    """Scenario."""
    import torch
    from safetensors.torch import load

    found, expected = formats.load_file(FILE), load(FILE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["w3"].dtype == torch.float32


def test_tensors_of_torch() -> None:
    """What the package safetensors returns of the same bytes."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("safetensors", reason="the package safetensors is not installed")
    play(of_torch)
