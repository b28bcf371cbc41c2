"""`report.observers`: who is told."""

from __future__ import annotations

from typing import Any

from aiouffd.report.observers import install, installed


def test_one_is_told_until_another_is_installed() -> None:
    """By default, nobody."""
    observer: Any = object()
    assert installed() is None
    install(observer)
    assert installed() is observer
    install(None)
    assert installed() is None
