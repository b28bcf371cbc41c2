"""Pythons of Debian's suites with what the tests need, unpacked beside the system, for any architecture.

A root is a file system: a Python with all that it depends on, and in `packages` the packages with native parts, from
PyPI. Packages in pure Python are those of this machine's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from debian_packages import UnobtainableError, unpacked

__all__ = ["PURE", "REPOSITORY", "SUMMARY", "is_needed", "root"]

REPOSITORY = Path(__file__).parents[1]
PURE = Path(sysconfig.get_paths()["purelib"])
SUITES = {"3.11": "bookworm", "3.13": "trixie", "3.14": "sid", "3.15": "sid"}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_NATIVE = ("uvloop", "numpy", "hypothesis")
_NEEDED = re.compile(
    r"_?(attrs?|cloudpickle|blockbuster|forbiddenfruit|sortedcontainers|py|py_?test.*|pluggy|iniconfig|packaging"
    r"|xdist|execnet|pygments|click|rich|markdown_it.*|mdurl|prometheus_client|typing_extensions|fsspec)(-[0-9].*|\.py)?$"
)
"""Packages in pure Python that tests need."""

SUMMARY = re.compile(r"\d+ (?:passed|failed)[^=]*?(?= in \d)")
"""What pytest says at its end."""


def is_needed(file: Path) -> bool:
    """Tell whether a file below `PURE` is of a package in pure Python that tests need."""
    return _NEEDED.match(file.relative_to(PURE).parts[0]) is not None


def root(version: str, architecture: str, *tools: str, wheel: bool = False) -> Path:
    """Return a root, fetched on first use and kept.

    Args:
        version: of Python: 3.13.
        architecture: as Debian calls it.
        *tools: other packages of Debian's that it has, too.
        wheel: put in the release's wheel, built from the repository as it is now (the group `wheels`).

    Raises:
        UnobtainableError: with the reason.
    """
    if version not in SUITES:
        raise UnobtainableError(f"Debian's suites have no Python {version}; they have {', '.join(SUITES)}")
    name, suite = f"matrix-python{version}-{'-'.join((architecture, *tools))}", SUITES[version]
    made = unpacked(name, suite, [f"python{version}", *tools], architecture=architecture, dependencies=True)
    if missing := [one for one in _NATIVE if not (made / "packages" / one).exists()]:
        _install(made, version, architecture, *missing)
    if wheel:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, REPOSITORY / "tools/wheels.py", "--output", folder], check=True)
            _install(made, version, architecture, *Path(folder).glob(f"*_{MACHINES[architecture]}.whl"))
    return made


def _install(made: Path, version: str, architecture: str, *packages: str | Path) -> None:
    machine = MACHINES[architecture]
    platforms = [f"--platform=manylinux_2_28_{machine}", f"--platform=manylinux2014_{machine}"]
    choice = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={version}", *platforms]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", f"--target={made}/packages"]
    subprocess.run([*install, *choice, *packages], check=True)
