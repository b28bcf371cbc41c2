"""`store`: its public names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aiouffd import store


def test_every_public_name_exists() -> None:
    """`__all__` is sorted, and each of its names is there; others are not."""
    assert list(store.__all__) == sorted(store.__all__)
    assert all(getattr(store, name).__name__ == name for name in store.__all__)
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = store.nothing


@pytest.mark.parametrize("library", ["zstandard", "lz4", "blake3", "aiouffd.store.writer", "aiouffd.store.chunks"])
def test_who_has_no_snapshots_does_without(library: str) -> None:
    """`import aiouffd` imports neither the extra's libraries nor the modules."""
    code = f"import sys, aiouffd; sys.exit({library!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
