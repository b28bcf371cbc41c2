"""The architecture: imports point down only."""

from __future__ import annotations

import ast
from pathlib import Path

import aiouffd

PACKAGE = Path(aiouffd.__file__).parent

# The lowest first; a module may import from its own level and from below.
LEVELS = [
    {"errors", "ranges", "loglines"},
    {"native"},
    {"kernel"},
    {"sources"},
    {"engine"},
    {"handoff"},
    {"pager"},
    {"monitor", "server", "lazy_pages", "metrics", "testing", "doctor", "page_server"},
    {"opening"},
    {"__init__"},
    {"demo", "daemon", "serving", "commands", "cli", "__main__"},
]


def level(module: str) -> int:
    """Return the level of a module below the package; the package itself is its `__init__`."""
    return next(number for number, names in enumerate(LEVELS) if module in names)


def imported(path: Path) -> set[str]:
    """Return the first parts of what a file imports from this package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "aiouffd":
                continue
            below = parts[1] if len(parts) > 1 else "__init__"
            exists = (PACKAGE / below).is_dir() or (PACKAGE / f"{below}.py").exists()
            found.add(below if exists else "__init__")
    return found


def test_imports_point_down_only() -> None:
    """No module imports from a level above its own, not even for types."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        wrong += [f"{path.relative_to(PACKAGE)} imports {name}" for name in imported(path) if level(name) > level(own)]
    assert not wrong


def test_the_core_needs_no_extra() -> None:
    """`import aiouffd` imports neither click, rich, numpy nor obstore."""
    import subprocess
    import sys

    code = "import sys, aiouffd; print({'click', 'rich', 'numpy', 'obstore'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_every_public_name_exists() -> None:
    """`__all__` is sorted, and each of its names is there."""
    assert list(aiouffd.__all__) == sorted(aiouffd.__all__)
    assert all(hasattr(aiouffd, name) for name in aiouffd.__all__)
