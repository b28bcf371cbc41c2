"""What is packed, and that it installs: the sdist, the wheel, their metadata, and the check of the release's wheels."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tools import wheels

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, **environment: str) -> str:
    """Run a command; return its output."""
    return wheels.run(*map(str, command), **environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist."""
    return wheels.build_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from the sdist on this machine."""
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir", "-w", directory, sdist)
    (path,) = directory.glob("*.whl")
    return path


def test_the_sdist_holds_the_repository(sdist: Path) -> None:
    """All that git tracks, but for files that only a checkout needs."""
    with tarfile.open(sdist) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    tracked = set(run("git", "ls-files").splitlines()) if (ROOT / ".git").exists() else set()
    assert {name for name in tracked - packed if (ROOT / name).exists()} == set()
    assert {"PKG-INFO", "README.md", "LICENSE", "aiouffd/native/build.py", "tests/test_packaging.py"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_the_package_only(wheel: Path) -> None:
    """The package with its C files and its native part; no test, no example, no page server."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"aiouffd", f"{wheel.name.split('-py3')[0]}.dist-info"}
    c_files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "aiouffd" / "native").glob("*.[ch]")}
    assert c_files | {"aiouffd/py.typed", "aiouffd/native/libaiouffd.so"} <= set(names)
    assert "aiouffd/page_server.py" not in names
    assert len(names) == len(set(names))


def test_a_release_wheel_needs_its_native_part(sdist: Path, tmp_path: Path) -> None:
    """Where a platform is asked for, a compiler that fails is no pure wheel but an error."""
    command = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        sdist,
    )
    left = tmp_path / "left"
    left.mkdir()
    without = {"CC": "/nonexistent/cc", "TMPDIR": str(left)}
    with pytest.raises(wheels.WheelError, match="no C compiler"):
        run(*command, **without, AIOUFFD_WHEEL_PLATFORM=wheels.platform_tag("x86_64"))
    run(*command, **without)
    assert list(left.iterdir()) == []
    left.rmdir()
    assert [path.name[-12:] for path in tmp_path.iterdir()] == ["none-any.whl"]


USE = """
import aiouffd, aiouffd.native
assert aiouffd.native.reason() == "", aiouffd.native.reason()
with aiouffd.Monitor(aiouffd.Region(1 << 20), aiouffd.BufferSource(b"x" * (1 << 20))) as monitor:
    assert monitor.region[12345] == ord("x")
print(aiouffd.__version__)
"""


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_it_installs_into_a_fresh_environment(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """With the core's dependencies only: a region is served, and the command names the extra that it lacks."""
    path = request.getfixturevalue(kind)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    python = tmp_path / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-cache-dir", path)
    script = tmp_path / "use.py"
    script.write_text(USE)
    version = run(python, "-P", script).strip()
    assert path.name.startswith(f"aiouffd-{version}")
    result = subprocess.run([tmp_path / "bin" / "aiouffd"], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode != 0
    assert "pip install 'aiouffd[cli]'" in result.stderr


def requirements() -> dict[str, list[str]]:
    """Return the names that each list of requirements holds, without aiouffd's own extras."""
    lists = {"": PROJECT["project"]["dependencies"]}
    lists |= PROJECT["project"]["optional-dependencies"] | PROJECT["dependency-groups"]
    return {
        where: [name for one in items if isinstance(one, str) and (name := re.split(r"[<>=\[]", one)[0]) != "aiouffd"]
        for where, items in lists.items()
    }


def test_each_requirement_stands_once() -> None:
    """Extras and groups include each other; none repeats what another lists."""
    counts = Counter(name for names in requirements().values() for name in names)
    assert [name for name, count in counts.items() if count > 1] == []


def test_the_core_requires_little() -> None:
    """Everything else is an extra."""
    assert requirements()[""] == ["attrs", "cloudpickle", "uvloop"]
    assert {"demo", "test"} <= set(PROJECT["project"]["optional-dependencies"])  # README.md installs them


def fake_wheel(directory: Path, *, tag: str, machine: int | None) -> Path:
    """Write a wheel whose native part is an ELF header for a machine, or is missing."""
    path = directory / f"aiouffd-0-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as file:
        if machine is not None:
            file.writestr(wheels.NATIVE, b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, machine) + bytes(44))
    return path


@pytest.mark.parametrize(
    ("tag", "machine", "complaint"),
    [
        ("linux_x86_64", 62, "is not tagged"),
        ("any", None, "is not tagged"),
        (wheels.platform_tag("aarch64"), 183, "is not tagged"),
        (wheels.platform_tag("x86_64"), None, "lacks aiouffd/native"),
        (wheels.platform_tag("x86_64"), 183, "is not an ELF file for x86_64"),
    ],
)
def test_a_wheel_that_is_not_what_its_name_says(tmp_path: Path, tag: str, machine: int | None, complaint: str) -> None:
    """The tag, the native part and its architecture are checked."""
    with pytest.raises(wheels.WheelError, match=complaint):
        wheels.check_wheel(fake_wheel(tmp_path, tag=tag, machine=machine), "x86_64")


def test_a_wheel_that_needs_a_newer_glibc(wheel: Path, tmp_path: Path) -> None:
    """What this machine's compiler links may not be called manylinux_2_17."""
    architecture = wheel.stem.partition("linux_")[2]
    path = tmp_path / f"{wheel.name.partition('linux')[0]}{wheels.platform_tag(architecture)}.whl"
    path.write_bytes(wheel.read_bytes())
    with pytest.raises(wheels.WheelError, match="auditwheel says"):
        wheels.check_wheel(path, architecture)
