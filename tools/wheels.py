"""Builds the release: the sdist, and from it a manylinux wheel for each architecture. Checks each wheel.

    pip install --group wheels && python tools/wheels.py --output dist

The native part has no Python.h, so one wheel an architecture serves every version of Python. Zig compiles it against
the symbols of glibc 2.17; auditwheel confirms that the object needs nothing newer than the wheel's tag allows.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
GLIBC = "2.17"
MACHINES = {"x86_64": 62, "aarch64": 183}
"""Architecture -> e_machine of its ELF files."""
NATIVE = "aiouffd/native/libaiouffd.so"


class WheelError(Exception):
    """A wheel is not what its name says."""


def platform_tag(architecture: str) -> str:
    """Return the wheel's platform tag: by PEP 600, and the older name that means the same."""
    return f"manylinux_{GLIBC.replace('.', '_')}_{architecture}.manylinux2014_{architecture}"


def run(*command: str, **environment: str) -> str:
    """Run a command; return its output, or end with what it printed."""
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True, check=False, timeout=300
    )
    if result.returncode:
        raise WheelError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def zig() -> Path:
    """Return the compiler's program; `python -m ziglang` cannot be used in pip's isolated build environment."""
    package = importlib.util.find_spec("ziglang")
    if package is None or package.origin is None:
        raise WheelError("ziglang is not installed: pip install --group wheels")
    return Path(package.origin).with_name("zig")


def build_sdist(output: Path) -> Path:
    """Build the sdist."""
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(output))
    (path,) = output.glob("aiouffd-*.tar.gz")
    return path


def build_wheel(sdist: Path, output: Path, architecture: str) -> Path:
    """Build the wheel of one architecture from the sdist, as a user's pip does."""
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir"),
        *("--wheel-dir", str(output), str(sdist)),
        CC=f"{zig()} cc -target {architecture}-linux-gnu.{GLIBC}",
        AIOUFFD_WHEEL_PLATFORM=platform_tag(architecture),
    )
    (path,) = output.glob(f"aiouffd-*_{architecture}.whl")
    return path


def check_wheel(path: Path, architecture: str) -> None:
    """Check the tag, the architecture of the native part, and the glibc that it needs.

    Raises:
        WheelError: one of them is wrong.
    """
    tag = platform_tag(architecture)
    if not path.name.endswith(f"-py3-none-{tag}.whl"):
        raise WheelError(f"{path.name} is not tagged py3-none-{tag}")
    with zipfile.ZipFile(path) as wheel:
        if NATIVE not in wheel.namelist():
            raise WheelError(f"{path.name} lacks {NATIVE}")
        head = wheel.read(NATIVE)[:20]
    if head[:4] != b"\x7fELF" or struct.unpack_from("<H", head, 18) != (MACHINES[architecture],):
        raise WheelError(f"{NATIVE} of {path.name} is not an ELF file for {architecture}")
    report = re.sub(r"\s+", " ", run(sys.executable, "-m", "auditwheel", "show", str(path)))
    found = re.search(r'platform tag: "manylinux_(\d+)_(\d+)_(\w+)"', report)
    allowed = tuple(map(int, GLIBC.split(".")))
    if found is None or found[3] != architecture or (int(found[1]), int(found[2])) > allowed:
        raise WheelError(f"auditwheel says of {path.name}: {report}")


def check_import(path: Path) -> None:
    """Install a wheel of this machine's architecture into a fresh environment, and load its native part.

    Raises:
        WheelError: it cannot be installed, or the native part cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as directory:
        run(sys.executable, "-m", "venv", "--without-pip", directory)
        python = f"{directory}/bin/python"
        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", str(path))
        run(python, "-P", "-c", "import sys, aiouffd.native; sys.exit(aiouffd.native.reason() or 0)")


def main() -> int:
    """Build and check all; print the files."""
    parser = argparse.ArgumentParser(description="Build the sdist and the manylinux wheels, and check them.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="directory for the files (%(default)s)")
    output = parser.parse_args().output.resolve()
    if output.exists() and any(output.iterdir()):
        parser.error(f"{output} is not empty")
    output.mkdir(parents=True, exist_ok=True)
    try:
        sdist = build_sdist(output)
        for architecture in MACHINES:
            wheel = build_wheel(sdist, output, architecture)
            check_wheel(wheel, architecture)
            if architecture == os.uname().machine:
                check_import(wheel)
    except WheelError as error:
        print(f"tools/wheels.py: {error}", file=sys.stderr)
        return 1
    for path in sorted(output.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
