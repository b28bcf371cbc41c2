"""The package itself: names that are imported on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import aiouffd

LATE = {"ObjectSource": "aiouffd.sources.object_store", "Server": "aiouffd.server.server"}


def test_late_names_are_there() -> None:
    """As attributes, in `dir`, and by `from aiouffd import`."""
    for name, module in LATE.items():
        assert getattr(aiouffd, name).__module__ == module
        assert name in dir(aiouffd)
        namespace: dict[str, object] = {}
        exec(f"from aiouffd import {name}", namespace)
        assert namespace[name] is getattr(aiouffd, name)


def test_a_name_that_is_not_there() -> None:
    """It is an AttributeError, as of any module."""
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = aiouffd.Nothing


def test_they_are_imported_on_first_use() -> None:
    """And no HTTP library before."""
    code = f"import sys, aiouffd; sys.exit(bool({{'http.client', *{list(LATE.values())}}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", f"{code[:19]}; aiouffd.ObjectSource; aiouffd.Server"], check=True)
