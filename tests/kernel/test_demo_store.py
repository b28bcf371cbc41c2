"""`aiouffd demo --store`: a snapshot cold, and from a cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def test_the_second_visit_fetches_almost_nothing(tmp_path: Path) -> None:
    """Each touched byte is right, both times; the second layer is small; nothing is left behind."""
    command = [sys.executable, "-m", "aiouffd", "demo", "--store", "--size", "16M", "--touches", "200"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "120"}
    output = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=environment).stdout
    layers = [int(found.replace(",", "")) for found in re.findall(r"layer +([\d,]+) bytes", output)]
    assert layers[0] > 10 * layers[1] > 0
    assert layers[0] < (16 << 20) // 2
    found = re.search(r"fetched +([\d,]+) bytes +([\d,]+) bytes +([\d.]+)", output)
    assert found is not None, output
    cold, warm = (int(found[number].replace(",", "")) for number in (1, 2))
    # The index and the manifest come again, and chunks that only this visit's readahead has reached.
    assert layers[0] > cold > 5 * warm > 0
    assert "Every touched byte is right" in output
    assert not list(tmp_path.iterdir())
