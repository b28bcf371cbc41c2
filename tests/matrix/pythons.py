"""Run tests with several Pythons on this kernel.

    python tests/matrix/pythons.py PYTHON... [--timeout SECONDS] [--tests ARGUMENT...]

A PYTHON is an interpreter, for example a free-threaded one, which gets an environment of its own with what PyPI has for
it; or a version of Debian's (3.14), which runs in a root of its own (`tests/debian_roots.py`; that needs root). What
was fetched is kept. The last lines are rows for the table in docs/reference/kernel.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import debian_roots
from debian_packages import cache_directory
from debian_roots import PURE, REPOSITORY, SUMMARY

NEEDED = (
    *("attrs", "cloudpickle", "click", "rich", "prometheus_client", "fsspec", "blockbuster", "hypothesis"),
    *("pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist"),
)
WANTED = ("uvloop", "obstore", "numpy", "aiohttp", "blake3", "lz4", "zstandard")
"""What not each Python has; what is missing is said."""
QUICK = (
    "tests/matrix/test_smoke.py",
    *(
        f"tests/kernel/test_{name}.py"
        for name in (
            *("faults", "in_process", "in_thread", "in_thread_safety", "layout", "map", "monitor", "pager", "region"),
            *("sigbus", "userfaultfd"),
        )
    ),
)
DESCRIPTION = (
    "import os, sys, sysconfig; free = 't' * bool(sysconfig.get_config_var('Py_GIL_DISABLED')); here = os.uname()\n"
    "page, version = os.sysconf('SC_PAGE_SIZE') >> 10, sys.version.split()[0] + free\n"
    "print('|', here.release.partition('-')[0], '|', here.machine, '|', page, 'KiB |', version, '|')"
)


def environment(python: str) -> list[str]:
    """Return the command of an interpreter in an environment of its own, made on first use and kept."""
    asked = [python, "-c", "import sys; print(sys.implementation.cache_tag, getattr(sys, 'abiflags', ''), sep='')"]
    tag = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    folder = cache_directory() / f"matrix-{tag}"
    own = str(folder / "bin/python")
    if not folder.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
        install = [own, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--no-binary=forbiddenfruit"]
        subprocess.run([*install, *NEEDED], check=True)
        for name in WANTED:
            if subprocess.run([*install, name], check=False, capture_output=True).returncode:
                print(f"{tag}: PyPI has no {name} for it")
    return ["env", f"PYTHONPATH={REPOSITORY}", own]


def in_root(version: str) -> list[str]:
    """Return the command of a Python of Debian's, in its root and in a mount namespace of its own."""
    root = debian_roots.root(version, "amd64", "dash", "coreutils", "gcc", "libc6-dev")
    mounts = [
        ("/proc", "proc"),
        ("/sys", "sys"),
        ("/dev", "dev"),
        ("/tmp", "tmp"),
        ("/etc/ssl", "etc/ssl"),
        (REPOSITORY, "repository"),
        (PURE, "pure"),
    ]
    steps = [f"mkdir -p {root}/{place} && mount --rbind {source} {root}/{place}" for source, place in mounts]
    steps += [
        "cd /",
        f"mkdir -p {root}/root",
        f"cp /etc/passwd /etc/group /etc/hosts {root}/etc",
        f"ln -sf gcc {root}/usr/bin/cc",
    ]
    inside = f'cd /repository && exec python{version} "$@"'
    steps.append(f'exec chroot {root} /bin/dash -c {shlex.quote(inside)} sh "$@"')
    settings = ("PYTHONPATH=/repository:/packages:/pure", "HOME=/root", "PYTHONDONTWRITEBYTECODE=1")
    return ["env", *settings, "unshare", "--mount", "sh", "-ec", "\n".join(steps), "sh"]


def main() -> int:
    """Run the tests with each Python in turn; the status is that of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for each Python")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, default=list(QUICK), help="arguments of pytest")
    given = parser.parse_args()
    rows, status = [], 0
    for python in given.pythons:
        command = environment(python) if Path(python).exists() else in_root(python)
        row = subprocess.run([*command, "-c", DESCRIPTION], check=True, capture_output=True, text=True).stdout.strip()
        arguments = ["-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "--timeout=300", *given.tests]
        summary = "did not come to an end"
        with subprocess.Popen(
            ["timeout", str(given.timeout), *command, *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            env=os.environ,
        ) as run:
            assert run.stdout is not None
            for line in run.stdout:
                text = line.decode(errors="replace").rstrip()
                print(text, flush=True)
                if found := SUMMARY.search(text):
                    summary = found[0]
        status = status or run.returncode
        tests = "quick" if given.tests == list(QUICK) else " ".join(given.tests)
        rows.append(f"{row} {summary}: {tests} |")
    print("\n".join(rows))
    return status


if __name__ == "__main__":
    sys.exit(main())
