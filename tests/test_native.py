"""`native`: the native part is built on installation where there is a compiler; without it the rest works."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import unmeasured

import aiouffd
from aiouffd import native
from aiouffd.cli import doctor
from aiouffd.native import build

ROOT = Path(__file__).parent.parent
NOWHERE = "/nonexistent/cc"
PIP = [sys.executable, "-m", "pip"]
QUICKLY = ["--quiet", "--no-deps", "--no-build-isolation"]  # what is fetched for a build is tried in test_packaging


def test_it_is_here() -> None:
    """The tests run where there is a compiler."""
    assert native.reason() == ""
    assert native.is_known()
    assert native.library().aiouffd_fingerprint() & 0xFFFFFFFF == build.fingerprint()
    assert doctor.examine().facts["native part"] == "present"


def test_it_is_not_looked_for_before_it_is_needed() -> None:
    """A Monitor that is entered on a loop asks, and has a thread look for it."""
    code = "from aiouffd import native; assert not native.is_known(); native.reason(); assert native.is_known()"
    subprocess.run([sys.executable, "-c", code], check=True)


def copied(tmp_path: Path) -> Path:
    """Copy what a build needs, without what was built before."""
    root = tmp_path / "source"
    root.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "aiouffd", root / "aiouffd", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return root


def installed(root: Path, target: Path, compiler: str, *options: str) -> list[str]:
    """Install into a directory of its own; return the names of what was put there."""
    quickly = QUICKLY if not options else QUICKLY[:-1]  # an editable one needs another package for its build
    subprocess.run(
        [*PIP, "install", *quickly, "--target", target, *options, root],
        check=True,
        env={**unmeasured(), "CC": compiler},
        timeout=100,
    )
    return [str(path.relative_to(target)) for path in target.rglob("*")]


def without(target: Path, statement: str, errors: Path | None = None) -> str:
    """Run a statement with the package that lies in `target`; return what it prints, and keep what it says."""
    script = f"import sys; sys.path.insert(0, {str(target)!r}); import aiouffd\n{statement}"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    if errors is not None:
        errors.write_text(done.stderr)
    return done.stdout


ASK = """
import aiouffd.native
try:
    aiouffd.native.library()
except aiouffd.UnsupportedError as error:
    print(error)
else:
    print("here", aiouffd.native.__file__)
"""


def test_an_install_with_a_compiler(tmp_path: Path) -> None:
    """The wheel is this platform's and no version's of Python, and nothing is left in the source tree."""
    root = copied(tmp_path)
    names = installed(root, tmp_path / "target", "cc")
    assert "aiouffd/native/libaiouffd.so" in names
    assert "Tag: py3-none-linux" in next((tmp_path / "target").glob("*.dist-info/WHEEL")).read_text()
    assert without(tmp_path / "target", ASK).startswith(f"here {tmp_path}")
    assert not list(root.rglob("*.so"))


def test_an_install_without_a_compiler(tmp_path: Path) -> None:
    """It succeeds; what needs the C part says what to do, and so does the doctor."""
    names = installed(copied(tmp_path), tmp_path / "target", NOWHERE)
    assert not [name for name in names if name.endswith(".so")]
    assert "Tag: py3-none-any" in next((tmp_path / "target").glob("*.dist-info/WHEEL")).read_text()
    assert "install a C compiler" in without(tmp_path / "target", ASK)
    report = "from aiouffd.cli import doctor\nprint(*doctor.examine().lines(), sep='\\n')"
    assert "native part          missing" in without(tmp_path / "target", report)


@pytest.mark.long
def test_an_editable_install(tmp_path: Path) -> None:
    """What is built lies in the source tree; a later install without a compiler takes it away again."""
    root = copied(tmp_path)
    built = root / "aiouffd" / "native" / "libaiouffd.so"
    installed(root, tmp_path / "target", "cc", "--editable")
    assert built.exists()
    assert without(root, ASK).startswith(f"here {root}")
    with (root / "aiouffd" / "native" / "native.h").open("a") as file:
        file.write("\n")
    assert "other C files" in without(root, ASK)
    monitored = "with aiouffd.open(b'x' * 4096) as region: print(region[0])"
    assert without(root, monitored, errors := tmp_path / "errors") == "120\n"
    assert "was built from other C files" in errors.read_text()  # also where all goes on without it
    installed(root, tmp_path / "again", NOWHERE, "--editable")
    assert not built.exists()


def test_a_wheel_has_no_build_of_the_source_tree(tmp_path: Path) -> None:
    """One that was left there by an editable install may be out of date."""
    root = copied(tmp_path)
    (root / "aiouffd" / "native" / "libaiouffd.so").write_bytes(b"old")
    subprocess.run(
        [*PIP, "wheel", *QUICKLY, "--wheel-dir", tmp_path, root],
        check=True,
        env={**unmeasured(), "CC": NOWHERE},
        timeout=100,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert "aiouffd/native/signal.c" in zipfile.ZipFile(wheel).namelist()
    assert "aiouffd/native/libaiouffd.so" not in zipfile.ZipFile(wheel).namelist()


def test_the_error_can_be_caught_as_what_it_is() -> None:
    """It is an UnsupportedError, as for a kernel that lacks a feature."""
    error = aiouffd.NativePartError("why")
    assert isinstance(error, aiouffd.UnsupportedError)
    assert str(error).startswith("why; ")


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process can be told to do without it, and says so."""
    code = "import aiouffd.native; print(aiouffd.native.reason())"
    for value, why in (("0", "AIOUFFD_NATIVE=0 is set: unset it\n"), ("1", "\n")):
        monkeypatch.setenv(native.SWITCH, value)
        assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == why
