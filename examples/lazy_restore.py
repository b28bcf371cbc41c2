"""Checkpoint a running process with CRIU, and restore it at once: its memory follows while it runs.

    sudo python examples/lazy_restore.py PID DIRECTORY

Needs root and CRIU (4.1 or later on new kernels). The process is stopped, written to DIRECTORY, and restored with its
pages missing; `aiouffd lazy-pages` brings what it touches first, and then the rest.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description="Checkpoint a process, and restore it lazily.")
    parser.add_argument("pid", type=int)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--criu", default="criu", help="the program, with arguments (%(default)s)")
    parser.add_argument("--shell-job", action="store_true", help="the process belongs to a terminal")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    criu = arguments.criu.split()
    images = ["-D", str(arguments.directory), *(["--shell-job"] if arguments.shell_job else [])]

    began = time.perf_counter()
    subprocess.run([*criu, "dump", "-t", str(arguments.pid), *images, "-o", "dump.log"], check=True)
    print(f"dumped after {time.perf_counter() - began:.2f} s")
    while Path(f"/proc/{arguments.pid}").exists():  # its parent has not waited for it yet
        time.sleep(0.01)

    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(arguments.directory)]) as daemon:
        while not (arguments.directory / "lazy-pages.socket").exists():
            if daemon.poll() is not None:
                return 1
            time.sleep(0.01)
        restore = [*criu, "restore", "--lazy-pages", "--restore-detached", *images, "-o", "restore.log"]
        subprocess.run(restore, check=True)
        print(f"runs again after {time.perf_counter() - began:.2f} s")
        status = daemon.wait()
        print(f"all its memory is there after {time.perf_counter() - began:.2f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
