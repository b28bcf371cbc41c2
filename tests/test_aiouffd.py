"""The package itself: names that are imported on first use."""

from __future__ import annotations

import ast
import functools
import os
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


@functools.cache
def modules_of(code: str, *arguments: str) -> set[str]:
    """Return the modules that a program has imported in the end."""
    process = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},  # it imports much
    )
    return set(process.stdout.split())


HEAVY = {"asyncio", "cloudpickle", "http.client", "numpy", "obstore", "pathlib", "pickle", "random", "shutil", "ssl"}
HEAVY |= {"logging", "traceback"}
"""What most programs with a Monitor can do without, apart from what they import themselves."""

ENGINE = {"engine", "engine.mappings", "engine.options", "engine.serve", "engine.serve.bounds"}


def test_an_application_imports_what_a_monitor_needs_until_its_pager_is_started() -> None:
    """And nothing else: neither an event loop, nor the engine that the pager runs, nor what only other engines need."""
    found = modules_of("import aiouffd")
    ours = {name.removeprefix("aiouffd.") for name in found if name.startswith("aiouffd.")}
    assert not HEAVY & found
    assert {name for name in ours if name.startswith("engine")} <= ENGINE
    others = {f"monitor.engines.{name}" for name in ("in_process", "in_thread", "served_by", "local")}
    assert not ours & {
        *others,
        "monitor.recording",
        "pager.client.client",
        "pager.client.pair",
        "pager.client.tenant",
        "rpc",
        "handoff",
        "server",
        "criu",
        "cli",
        "testing",
        "sources.concat",
        "sources.file",
        "store",
    }
    assert {"monitor.monitor", "pager.client.launch"} <= ours


def test_a_pager_imports_what_its_worker_needs() -> None:
    """Nothing of its client's, nor what compiles, nor a source that it may not be asked for."""
    found = modules_of("import aiouffd, aiouffd.pager.__main__", "aiouffd.pager")
    assert not (HEAVY - {"asyncio", "logging", "ssl", "traceback"}) & found
    ours = {name.removeprefix("aiouffd.") for name in found if name.startswith("aiouffd.")}
    assert "pager.process.worker" in ours
    assert not ours & {"monitor", "pager.client", "sources.file"}


@pytest.mark.parametrize("name", aiouffd._LATE)
def test_what_is_imported_when_it_is_taken(name: str) -> None:
    """A program that gives up the right to read these modules takes the names before."""
    home = names_for_type_checkers()[name]
    assert home not in modules_of("import aiouffd")
    assert home in modules_of(f"from aiouffd import {name}")
