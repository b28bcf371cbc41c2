"""`native.build`: the C files, and what makes one library of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import sanitizers

from aiouffd.native import build

NOWHERE = "/nonexistent/cc"
C_FILES = (
    "common",
    "gil",
    "uffd",
    "copies",
    "table",
    "plain",
    "chain",
    "ask",
    "crash_notes",
    "signal",
    "watchdog",
    "dropper",
    "watch_servers",
    "watch_loop",
    "reader",
)
"""The lowest first."""


def test_the_c_files_include_lower_ones_only() -> None:
    """Each file knows the ones below it: so there is no circle."""
    files = [*Path(build.HERE).glob("*.c"), *Path(build.HERE).glob("*.h")]
    assert {path.stem for path in files} == set(C_FILES)
    for path in files:
        for included in re.findall(r'#include "(\w+)\.h"', path.read_text()):
            lower = C_FILES.index(included) < C_FILES.index(path.stem)
            assert lower or included == path.stem, f"{path.name} includes {included}.h"


def test_the_c_functions_are_short() -> None:
    """None has more than 60 lines."""
    for path in Path(build.HERE).glob("*.c"):
        for function in re.findall(r"^\w[^;{}]*\)\n\{\n.*?^\}", path.read_text(), re.DOTALL | re.MULTILINE):
            assert function.count("\n") < 60, f"{path.name}: {function[:80]}"


def test_the_c_files_compile_without_a_warning(tmp_path: Path) -> None:
    """Optimised and not, and with all that -Wconversion and others find."""
    for number, flags in enumerate((["-Werror"], ["-Werror", "-O0", "-Wpedantic", "-Wshadow", "-Wconversion"])):
        build.build(tmp_path / f"{number}.so", *flags)


def test_only_its_own_names_can_be_seen_outside(tmp_path: Path) -> None:
    """What the C files share must not meet another library's names."""
    build.build(tmp_path / "it.so")
    listed = subprocess.run(
        ["nm", "--dynamic", "--defined-only", tmp_path / "it.so"], check=True, capture_output=True, text=True
    )
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert names
    assert all(name.startswith("aiouffd_") for name in names)


def test_a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, whether it was asked for or looked for."""
    monkeypatch.setenv("CC", NOWHERE)
    with pytest.raises(build.BuildError, match=NOWHERE):
        build.build(tmp_path / "it.so")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="neither cc"):
        build.build(tmp_path / "it.so")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    """Nothing is left behind."""
    with pytest.raises(build.BuildError, match="no-such-flag"):
        build.build(tmp_path / "it.so", "--no-such-flag")
    assert not list(tmp_path.iterdir())


def test_a_compiler_of_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CC may have arguments, as a cross compiler's has; they come first."""
    shown = tmp_path / "shown"
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\necho "$1 $2" > {shown}\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"{compiler} -DONE -DTWO")
    build.build(tmp_path / "it.so")
    assert shown.read_text() == "-DONE -DTWO\n"
    assert (tmp_path / "it.so").exists()


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    """The compiler says which there are."""
    with pytest.raises(build.BuildError, match="supports x86-64 and aarch64"):
        build.build(tmp_path / "it.so", "-U__x86_64__", "-U__aarch64__")


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sanitizers.SANITIZERS)
def test_sanitizers(name: str) -> None:
    """They find nothing in a run of the native part's tests."""
    assert sanitizers.run(name) == 0
