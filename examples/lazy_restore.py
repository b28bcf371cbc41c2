"""Checkpoint a running process with CRIU and restore it at once: its memory follows while it runs.

    sudo python examples/lazy_restore.py                      # starts a sample process and restores that
    sudo python examples/lazy_restore.py PID DIRECTORY

Needs root and CRIU (4.1 or later on new kernels). The process and all processes below it are stopped, written to
DIRECTORY, and restored with their pages missing. `aiouffd lazy-pages` brings the pages that they touch first, and then
the rest.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


def family(pid: int) -> list[int]:
    """Return the pids of a process and of its descendants."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def gone(pid: int) -> bool:
    """Return whether a process has ended; if it was a child of this program, wait for it."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return not Path(f"/proc/{pid}").exists()


def checkpoint_and_restore(pid: int, directory: Path, criu: list[str], options: list[str]) -> int:
    """Dump a process and its descendants, restore them lazily, and wait until all their memory is there."""
    pids = family(pid)
    images = ["-D", str(directory), *options]
    began = time.perf_counter()
    if subprocess.run([*criu, "dump", "-t", str(pid), *images, "-o", "dump.log"], check=False).returncode:
        print(f"the dump failed, and the process runs on: see {directory}/dump.log", file=sys.stderr)
        return 1
    print(f"dumped after {time.perf_counter() - began:.2f} s")
    while not all(map(gone, pids)):  # a pid is free when the parent has waited for its process
        time.sleep(0.01)

    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(directory)]) as daemon:
        while not (directory / "lazy-pages.socket").exists():
            if daemon.poll() is not None:
                return 1
            time.sleep(0.01)
        restore = [*criu, "restore", "--lazy-pages", "--restore-detached", *images, "-o", "restore.log"]
        if subprocess.run(restore, check=False).returncode:
            daemon.terminate()
            print(f"the restore failed: see {directory}/restore.log; the images are intact", file=sys.stderr)
            return 1
        print(f"runs again after {time.perf_counter() - began:.2f} s")
        status = daemon.wait()
        print(f"all its memory is there after {time.perf_counter() - began:.2f} s")
    return status


SAMPLE = """
import os, time
data = os.urandom(1 << 20) * 64
right = hash(data[::4096])
while True:
    print("right" if hash(data[::4096]) == right else "WRONG", flush=True)
    time.sleep(0.05)
"""


@contextlib.contextmanager
def sample(path: Path) -> Iterator[int]:
    """Run a process with 64 MiB of memory, which writes to a file whether its memory is right; yield its pid."""
    with path.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SAMPLE],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while not path.stat().st_size:
            time.sleep(0.01)
        yield process.pid
        lines = path.read_text().split()
        while len(path.read_text().split()) < len(lines) + 2:
            time.sleep(0.01)
        print(f"the sample process wrote {len(lines)} times that its memory is right, {lines.count('WRONG')} that not")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)  # it has the pid that it had before
        process.poll()


def main() -> int:
    parser = argparse.ArgumentParser(description="Checkpoint a process and restore it lazily.")
    parser.add_argument("pid", type=int, nargs="?", help="default: that of a sample process which this program starts")
    parser.add_argument("directory", type=Path, nargs="?", help="for the images (default: a temporary one)")
    parser.add_argument("--criu", default="criu", help="the program, with arguments (%(default)s)")
    parser.add_argument("--shell-job", action="store_true", help="the process belongs to a terminal")
    arguments = parser.parse_args()
    criu = arguments.criu.split()
    if shutil.which(criu[0]) is None:
        parser.error(f"{criu[0]}: no such program; --criu says where it is")
    if arguments.pid is not None and not Path(f"/proc/{arguments.pid}").exists():
        parser.error(f"there is no process {arguments.pid}")
    options = ["--shell-job"] if arguments.shell_job else []
    with contextlib.ExitStack() as stack:
        directory = arguments.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        pid = arguments.pid or stack.enter_context(sample(directory / "sample.txt"))
        return checkpoint_and_restore(pid, directory, criu, options)


if __name__ == "__main__":
    sys.exit(main())
