"""The package itself: names that are imported on first use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aiouffd


def names_for_type_checkers() -> dict[str, str]:
    """Return what the block for type checkers imports: name -> module."""
    block = next(node for node in ast.parse(Path(aiouffd.__file__).read_text()).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_each_public_name_is_imported_from_where_type_checkers_look_for_it() -> None:
    """As an attribute, in `dir`, and by `from aiouffd import`."""
    homes = names_for_type_checkers()
    assert set(aiouffd.__all__) == set(homes)
    for name, module in homes.items():
        assert getattr(aiouffd, name) is getattr(sys.modules[module], name)
        assert name in dir(aiouffd)
        namespace: dict[str, object] = {}
        exec(f"from aiouffd import {name}", namespace)
        assert namespace[name] is getattr(aiouffd, name)


def test_a_name_that_is_not_there() -> None:
    """It is an AttributeError, as of any module."""
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = aiouffd.Nothing


@pytest.mark.parametrize(
    ("arguments", "needed", "not_needed"),
    [
        ([], ["monitor.monitor", "monitor.engines.in_thread", "pager.client.client"], ["server.server"]),
        (["aiouffd.pager"], ["pager.process.worker"], ["monitor", "pager.client", "sources.file"]),
    ],
)
def test_a_program_imports_what_it_may_use(arguments: list[str], needed: list[str], not_needed: list[str]) -> None:
    """At once, before it gives up a privilege. And a pager nothing of its client's, nor what compiles."""
    code = "import sys, aiouffd, aiouffd.pager.__main__; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    found = process.stdout.split()
    assert {f"aiouffd.{name}" for name in needed} <= set(found)
    assert not {"shutil", "http.client", *(f"aiouffd.{name}" for name in not_needed)} & set(found)
