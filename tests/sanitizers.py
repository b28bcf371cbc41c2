"""`python tests/sanitizers.py`: build the native part with sanitizers, and run its tests with each of them.

AddressSanitizer must be loaded before everything else (LD_PRELOAD), and has SIGBUS for itself unless told not to. What
a sanitizer finds ends the process that it is found in with status 66, so that its test fails. ThreadSanitizer is left
out: it has handlers of its own in the place of ours, and most of these tests fail with it, without a report.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from aiouffd.native import build

TESTS = (
    "tests/kernel/test_in_thread.py",
    "tests/kernel/test_in_thread_safety.py",
    "tests/kernel/test_watchdog.py",
    "tests/kernel/test_in_process.py",
    "tests/kernel/test_layout.py",
    "tests/test_crash_notes.py",
)
COMMON = "handle_sigbus=0:handle_segv=0:handle_abort=0:allow_user_segv_handler=1:exitcode=66:abort_on_error=0"
SANITIZERS = {
    "undefined": ((), {"UBSAN_OPTIONS": "halt_on_error=1:exitcode=66:print_stacktrace=1"}),
    # Python's own memory is never freed at its end, and faults are taken on alternate stacks.
    "address": (("libasan.so",), {"ASAN_OPTIONS": f"{COMMON}:detect_leaks=0:use_sigaltstack=0"}),
}


def library(name: str) -> str:
    """Return the path of a sanitizer's library."""
    command = [*build.compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run(name: str, arguments: list[str]) -> int:
    """Build with a sanitizer, run the tests, and return pytest's status."""
    preload, options = SANITIZERS[name]
    static = ("-static-libubsan",) if name == "undefined" else ()
    build.build(build.HERE / build.NAME, f"-fsanitize={name}", "-g", "-fno-omit-frame-pointer", *static)
    environment = {**os.environ, **options}
    if preload:
        environment["LD_PRELOAD"] = " ".join(library(each) for each in preload)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or TESTS)]
    return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    """`sanitizers.py [NAME [TEST ...]]`: one of them or all; the ordinary build is there again afterwards."""
    os.chdir(Path(__file__).parent.parent)
    names = sys.argv[1:2] or list(SANITIZERS)
    try:
        failed = [name for name in names if run(name, sys.argv[2:])]
    finally:
        build.build(build.HERE / build.NAME)
    print(f"failed: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
