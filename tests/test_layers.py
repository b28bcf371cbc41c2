"""The architecture: in each folder, imports point down only, types included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import aiouffd

PACKAGE = Path(aiouffd.__file__).parent

# What each folder holds, the lowest first. A folder inside it stands for all that it holds.
ORDER = {
    "": [
        *("errors", "lifetime", "loops", "ranges", "rpc", "native", "kernel", "testing", "sources", "engine"),
        *(
            "report",
            "store",
            "handoff",
            "pager",
            "server",
            "criu",
            "monitor",
            "formats",
            "__init__",
            "otel",
            "cli",
            "__main__",
        ),
    ],
    "native": ["build", "__init__", "__main__", "faults", "crash_notes", "reader", "watchdog", "dropper"],
    "kernel": [
        *(
            "__init__",
            "abi",
            "libc",
            "sockets",
            "files",
            "limits",
            "owned_descriptor",
            "file_lock",
            "memory",
            "pagemap",
            "locked",
            "region_file",
            "residency",
            "region",
            "populated",
            "sharing",
            "events",
            "userfaultfd",
        ),
        *("write_tracker", "sigbus", "unserved"),
    ],
    "sources": [
        *(
            "__init__",
            "steps",
            "daemon_threads",
            "file_attributes",
            "holes",
            "repeated",
            "http_answer",
            "store_errors",
            "storage_options",
            "store_settings",
            "store_client",
        ),
        *("rooms", "loop_http", "second_loop", "helped_http", "plain_http", "base", "buffer", "file", "object_store"),
        *("fsspec_source", "concat", "overlay", "layered"),
    ],
    "engine": [
        *(
            "__init__",
            "statistics",
            "allowance",
            "mappings",
            "common_file",
            "present",
            "readahead",
            "runs",
            "two_threads",
            "flight",
            "moving",
            "resolver",
            "retrying",
            "deferred",
            "others",
            "remainders",
            "one_copy",
            "landing",
        ),
        *(
            "apart",
            "places",
            "protect",
            "clock",
            "dropping",
            "owner",
            "bound",
            "write_back",
            "kept",
            "arming",
            "capture",
            "moment",
            "plain",
            "space",
            "forsaking",
            "messages",
            "reading",
            "dispatcher",
            "serve",
            "ahead",
            "options",
            "assembly",
        ),
    ],
    "engine/serve": [
        *(
            "__init__",
            "zeros",
            "bounds",
            "handler",
            "precedence",
            "gate",
            "pace",
            "deadlines",
            "common",
            "reads",
            "extents",
            "presence",
            "bulk",
        ),
        *("source", "handler_backend"),
    ],
    "engine/ahead": ["__init__", "pages", "trace", "merging", "keeping", "fill"],
    "store": [
        *(
            "codecs",
            "manifest",
            "pack",
            "index",
            "seek_table",
            "place",
            "folder",
            "bucket",
            "snapshot",
            "workers",
            "chunks",
        ),
        *("key_locks", "cache_index", "segments", "cache_files", "view", "cache", "chunk_names", "fetches"),
        "cached_source",
        *(
            "snapshot_source",
            "zstd_seekable",
            "resolve",
            "filesystem",
            "layer",
            "aside",
            "scan",
            "image",
            "writer",
            "attaching",
            "live",
            "collect",
            "transfer",
            "__init__",
        ),
    ],
    "handoff": ["__init__", "json_lines", "own_threads", "receive", "firecracker", "nydus", "memory_file", "arrival"],
    "pager": ["__init__", "loglines", "process", "client", "__main__"],
    "pager/process": [
        *(
            "__init__",
            "handles",
            "inherited",
            "deaths",
            "cloning",
            "control",
            "serialization",
            "child_descriptors",
            "state",
            "journal",
            "notes",
            "tenancy",
        ),
        *("replay", "rewriting", "last_resort", "inaccessible", "common_files", "served", "blocked", "handover"),
        *("answers", "worker"),
        *("holder", "keeper"),
    ],
    "pager/client": [
        "__init__",
        "interpreter",
        "launch",
        "waiting",
        "pair",
        "asking",
        "packing",
        "tenant",
        "takeover",
        "abandoned",
        "fd_store",
        "holding",
        "succession",
        "client",
        "forks",
        "shared",
    ],
    "server": [
        "__init__",
        "listener",
        "requests",
        "jail",
        "metrics",
        "clashes",
        "prefilled",
        "rejection",
        "reception",
        "clients",
        "residence",
        "successor",
        "recordings",
        "services",
        "snapshots",
        "mapped",
        "entrance",
        "session",
        "happenings",
        "yielding",
        "server",
        "restarts",
        "control",
        "dashboard",
    ],
    "server/dashboard": ["__init__", "looks", "http"],
    "server/control": ["__init__", "values", "restoring", "actions", "problems", "openapi", "api"],
    "criu": ["__init__", "image_file", "images", "page_server", "relay", "socket", "lazy_pages"],
    "monitor": [
        *("__init__", "engines", "held", "memfd_lock", "registration", "beginnings", "error_queue", "deciding"),
        *(
            "crashes",
            "lookout",
            "recording",
            "reporting",
            "progress",
            "watching",
            "entered",
            "saving",
            "capturing",
            "checkpointer",
            "monitor",
            "early",
            "map",
            "open",
        ),
    ],
    "report": [
        *(
            "words",
            "measures",
            "observers",
            "perfetto",
            "timeline",
            "run",
            "advice",
            "charts",
            "heat",
            "page",
            "output",
        ),
        "__init__",
    ],
    "otel": ["instruments", "tracing", "instrumentor", "sdk", "__init__"],
    "formats": [
        *(
            "dtypes",
            "header",
            "spans",
            "arrays",
            "npy",
            "safetensors",
            "gguf",
            "stored_zip",
            "npz",
            "checkpoint",
            "whole",
        ),
        "__init__",
    ],
    "monitor/engines": [
        "__init__",
        "protocol",
        "calls",
        "layout",
        "local",
        "protecting",
        "in_process",
        "pipe",
        "extents",
        "in_thread",
        "on_demand",
        "pager",
        "served_by",
    ],
    "cli": [
        "__init__",
        "parameters",
        "daemon",
        "demo_server",
        "demo_parts",
        "demo_store",
        "demo",
        "doctor",
        "lazy_pages",
        "cache",
        "report",
        "serve",
        "unix_http",
        "ctl",
        "top",
        "traces",
        "snapshot",
        "commands",
    ],
}
LATE = {("cli/__init__", "cli/commands")}
"""Imports inside a function, of what needs an extra: by whom, of what."""


def name_of(path: Path) -> str:
    """Return a module's place in the package, with slashes: `pager/client/orphan`."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def module(dotted: str) -> str | None:
    """Return the place of what a dotted name stands for: a module, or a package's `__init__`."""
    parts = dotted.split(".")[1:]
    while parts:
        if PACKAGE.joinpath(*parts).with_suffix(".py").exists():
            return "/".join(parts)
        if PACKAGE.joinpath(*parts, "__init__.py").exists():
            return "/".join([*parts, "__init__"])
        parts.pop()
    return "__init__"


def imports(path: Path) -> set[str]:
    """Return the places of all that a file imports from this package."""
    found: set[str | None] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found.update(module(name) for name in names if name.split(".")[0] == "aiouffd")
    return {name for name in found if name is not None}


def split(importer: str, imported: str) -> tuple[str, str, str]:
    """Return the folder that two modules share, and what they are parts of in it."""
    one, other = importer.split("/"), imported.split("/")
    depth = 0
    while one[depth] == other[depth]:
        depth += 1
    return "/".join(one[:depth]), one[depth], other[depth]


def test_imports_point_down_only() -> None:
    """Within each folder, what is lower imports nothing that is higher, at any depth: so there is no circle either."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        importer = name_of(path)
        for imported in imports(path) - {importer}:
            folder, one, other = split(importer, imported)
            order = ORDER[folder]
            if order.index(other) >= order.index(one) and (importer, imported) not in LATE:
                wrong.append(f"{importer} imports {imported}")
    assert not sorted(wrong)


def test_each_module_has_its_place() -> None:
    """The order names each module and folder of the package, and nothing else."""
    there = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        parts = name_of(path).split("/")
        for depth in range(len(parts)):
            there["/".join(parts[:depth])].add(parts[depth])
    assert there == {folder: set(names) for folder, names in ORDER.items()}
    assert all(len(names) == len(set(names)) for names in ORDER.values())


@pytest.mark.parametrize("extra", ["click", "rich", "numpy", "obstore"])
def test_the_core_needs_no_extra(extra: str) -> None:
    """`import aiouffd` imports nothing that only an extra brings."""
    code = f"import sys, aiouffd; sys.exit({extra!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists() -> None:
    """`__all__` is sorted, and each of its names is there."""
    assert list(aiouffd.__all__) == sorted(aiouffd.__all__)
    assert all(hasattr(aiouffd, name) for name in aiouffd.__all__)
