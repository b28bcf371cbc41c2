"""Checkpoint a running process with CRIU, and restore it at once: its memory follows while it runs.

    sudo python examples/lazy_restore.py PID DIRECTORY

Needs root and CRIU (4.1 or later on new kernels). The process is stopped, written to DIRECTORY, and restored with its
pages missing; `aiouffd lazy-pages` brings what it touches first, and then the rest.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path


def family(pid: int) -> list[int]:
    """Return the pids of a process and of all below it."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Checkpoint a process, and restore it lazily.")
    parser.add_argument("pid", type=int)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--criu", default="criu", help="the program, with arguments (%(default)s)")
    parser.add_argument("--shell-job", action="store_true", help="the process belongs to a terminal")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    criu = arguments.criu.split()
    if shutil.which(criu[0]) is None:
        parser.error(f"{criu[0]}: no such program; --criu says where it is")
    if not Path(f"/proc/{arguments.pid}").exists():
        parser.error(f"there is no process {arguments.pid}")
    images = ["-D", str(arguments.directory), *(["--shell-job"] if arguments.shell_job else [])]

    pids = family(arguments.pid)
    began = time.perf_counter()
    if subprocess.run([*criu, "dump", "-t", str(arguments.pid), *images, "-o", "dump.log"], check=False).returncode:
        print(f"not dumped, and running on: see {arguments.directory}/dump.log", file=sys.stderr)
        return 1
    print(f"dumped after {time.perf_counter() - began:.2f} s")
    while any(Path(f"/proc/{pid}").exists() for pid in pids):  # they are zombies until somebody has waited for them
        time.sleep(0.01)

    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(arguments.directory)]) as daemon:
        while not (arguments.directory / "lazy-pages.socket").exists():
            if daemon.poll() is not None:
                return 1
            time.sleep(0.01)
        restore = [*criu, "restore", "--lazy-pages", "--restore-detached", *images, "-o", "restore.log"]
        if subprocess.run(restore, check=False).returncode:
            daemon.terminate()
            print(f"not restored: see {arguments.directory}/restore.log; the images are whole", file=sys.stderr)
            return 1
        print(f"runs again after {time.perf_counter() - began:.2f} s")
        status = daemon.wait()
        print(f"all its memory is there after {time.perf_counter() - began:.2f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
