"""The shape of the package: each module has its tests, and nothing in it grows too large."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import aiouffd

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(aiouffd.__file__).parent
TESTS = Path(__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

MODULE_LINES, CLASS_LINES, FUNCTION_LINES = 600, 400, 60


def place(path: Path) -> str:
    """Return a module's place in the package, with slashes: `pager/client/orphan`."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def has_code(path: Path) -> bool:
    """Tell whether a module does or defines anything, apart from imports, its docstring and dunder names."""
    for statement in ast.parse(path.read_text()).body:
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                pass
            case ast.Assign(targets=[ast.Name(id=name)]) if name.startswith("__"):
                pass
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pass
            case _:
                return True
    return False


def leaf(path: Path) -> str:
    """Return what a module is called: a package's `__init__` bears the name of its folder."""
    return path.parent.name if path.stem == "__init__" else path.stem.strip("_")


def defined(path: Path) -> Iterator[tuple[str, ast.AST, int]]:
    """Yield the qualified name, node and lines of each class and function of a module, without its decorators."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                assert child.end_lineno is not None
                yield name, child, child.end_lineno - child.lineno + 1
                yield from walk(child, f"{name}.")
            else:
                yield from walk(child, prefix)

    yield from walk(ast.parse(path.read_text()), "")


def too_large(path: Path) -> Iterator[str]:
    """Yield what is over the limits in a module, the module itself as its place."""
    if len(path.read_text().splitlines()) > MODULE_LINES:
        yield place(path)
    for name, node, lines in defined(path):
        if lines > (CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES):
            yield f"{place(path)}:{name}"


def is_tested(path: Path, leaves: Counter[str]) -> bool:
    """Tell whether a module has its own test file: `test_<leaf>.py`, or `test_<folder>_<leaf>.py`.

    The folder's name is needed where several modules have the same leaf.
    """
    names = [f"test_{path.parent.name}_{leaf(path)}.py"]
    if leaves[leaf(path)] == 1:
        names.append(f"test_{leaf(path)}.py")
    files = [folder / name for folder in (TESTS, TESTS / "kernel") for name in names]
    return any("\ndef test_" in text or "\nasync def test_" in text for text in texts(files))


def texts(files: list[Path]) -> Iterator[str]:
    """Yield the text of each file that exists."""
    for file in files:
        if file.exists():
            yield file.read_text()


def test_each_module_has_its_own_tests() -> None:
    """A module that has code has a test file that is named for it."""
    modules = [path for path in MODULES if has_code(path)]
    leaves = Counter(leaf(path) for path in modules)
    assert not [place(path) for path in modules if not is_tested(path, leaves)]


def test_each_test_file_has_a_name_of_its_own() -> None:
    """Pytest imports them by it."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert not [name for name, times in names.items() if times > 1]


def test_nothing_is_too_large() -> None:
    """No module has more than 600 lines, no class more than 400, no function more than 60."""
    assert not [name for path in MODULES for name in too_large(path)]


def test_the_limits_are_seen(tmp_path: Path) -> None:
    """A method in a class, and a function in a function, are measured as well."""
    body = "\n".join(f"            x{n} = {n}" for n in range(FUNCTION_LINES))
    sample = tmp_path / "sample.py"
    sample.write_text(f"class A:\n    def b(self):\n        async def c():\n{body}\n")
    assert [(name, lines) for name, _, lines in defined(sample)] == [("A", 63), ("A.b", 62), ("A.b.c", 61)]
