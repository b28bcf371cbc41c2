"""`python tests/sanitizers.py [NAME ...]`: run the native part's tests with builds by gcc's sanitizers, one or all.

Each runs in a copy of the package and its tests: the build that is in use is not touched. What a sanitizer finds ends
the process that it is found in with status 66, so that its test fails; the report is on standard error.

AddressSanitizer and ThreadSanitizer must be loaded before everything else (LD_PRELOAD), and have SIGBUS for themselves
unless told not to. ThreadSanitizer ends at its start where the kernel places memory at random.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import attrs

from aiouffd.native import build

ROOT = Path(__file__).parent.parent
COPIED = ("aiouffd", "benchmarks", "tests")
TESTS = (
    "tests/kernel/test_in_thread.py",
    "tests/kernel/test_in_thread_safety.py",
    "tests/kernel/test_watchdog.py",
    "tests/kernel/test_dropper.py",
    "tests/kernel/test_on_demand.py",
    "tests/kernel/test_in_process.py",
    "tests/kernel/test_layout.py",
    "tests/kernel/test_reader.py",
    "tests/kernel/test_both_readers.py",
    "tests/test_crash_notes.py",
    "tests/test_plain.py",
    "tests/test_reading.py",
)
FOUND = 66
HANDLERS = f"handle_sigbus=0:handle_segv=0:handle_abort=0:allow_user_segv_handler=1:exitcode={FOUND}:abort_on_error=0"


@attrs.frozen
class Sanitizer:
    """How to use one.

    Attributes:
        options: the environment variable of its options, and their value.
        library: what is preloaded; empty: it is linked statically.
        prefix: of the command that runs the tests.
        left_out: tests, each with the reason why it cannot pass.
    """

    options: tuple[str, str]
    library: str = ""
    prefix: tuple[str, ...] = ()
    left_out: dict[str, str] = attrs.field(factory=dict)


SANITIZERS = {
    "undefined": Sanitizer(("UBSAN_OPTIONS", f"halt_on_error=1:exitcode={FOUND}:print_stacktrace=1")),
    # Python's own memory is never freed at its end, and faults are taken on alternate stacks.
    "address": Sanitizer(("ASAN_OPTIONS", f"{HANDLERS}:detect_leaks=0:use_sigaltstack=0"), "libasan.so"),
    "thread": Sanitizer(
        ("TSAN_OPTIONS", f"{HANDLERS}:die_after_fork=0"),
        "libtsan.so",
        ("setarch", "--addr-no-randomize"),
        {
            "tests/kernel/test_watchdog.py::test_others_that_start_slowly_are_waited_for": (
                "its vfork is a fork: an event for the userfaultfd, which waits for a reader while there is none"
            ),
            "tests/kernel/test_in_thread_safety.py::test_other_signals_while_a_page_is_waited_for": (
                "it puts off each asynchronous signal until the thread calls glibc"
            ),
            "tests/kernel/test_in_thread_safety.py::test_a_page_that_cannot_be_had_without_poison[native]": (
                "CPython's faulthandler reads the frames of the loop's thread while it runs, slow here: the dump "
                "itself ends by SIGSEGV (dump_frame in traceback.c), once in some ten runs"
            ),
        },
    ),
}


def run(name: str) -> int:
    """Build with a sanitizer, run the tests, and return pytest's status."""
    sanitizer = SANITIZERS[name]
    environment = {**os.environ, sanitizer.options[0]: sanitizer.options[1]}
    if sanitizer.library:
        asked = [*build.compiler(), f"-print-file-name={sanitizer.library}"]
        environment["LD_PRELOAD"] = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    for test, why in sanitizer.left_out.items():
        print(f"{name}: {test} is left out: {why}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)  # one test is another user
        for each in COPIED:
            shutil.copytree(ROOT / each, Path(directory, each), ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(ROOT / "pyproject.toml", directory)
        library = Path(directory, "aiouffd/native", build.NAME)
        static = () if sanitizer.library else ("-static-libubsan",)
        build.build(library, f"-fsanitize={name}", "-g", "-fno-omit-frame-pointer", *static)
        environment["PYTHONPATH"] = directory
        tests = [*(f"--deselect={test}" for test in sanitizer.left_out), *TESTS]
        command = [*sanitizer.prefix, sys.executable, "-m", "pytest", "-q", "-n", "4", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=directory, env=environment, check=False).returncode


def main() -> int:
    """Return how many sanitizers found something, or could not be run."""
    failed = [name for name in sys.argv[1:] or SANITIZERS if run(name)]
    print(f"failed: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
