"""A rig for CRIU: gets a release that works on this kernel, checkpoints a process and restores it lazily.

Distributions of some age carry a CRIU that fails on new kernels. So a newer one is taken from the Debian mirror that
this machine's apt uses already (`debian_packages`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
from debian_packages import UnobtainableError, cache_directory, unpacked
from processes import adopt_orphans, descendants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SUBJECT = Path(__file__).parent / "criu_subject.c"
SUITE = "trixie"
PACKAGES = (
    *("libc6", "criu", "libcompel1", "libbsd0", "libgnutls30t64", "libnet1", "libnftables1", "libnl-3-200"),
    *("libprotobuf-c1", "libuuid1", "libmd0", "libp11-kit0", "libidn2-0", "libunistring5", "libtasn1-6"),
    *("libnettle8t64", "libhogweed6t64", "libgmp10", "libmnl0", "libnftnl11", "libxtables12", "libjansson4"),
    *("libffi8", "libedit2"),
)
LIBRARIES = "usr/lib/x86_64-linux-gnu"
CAP_SYS_RESOURCE = 24
PIPE_SIZE = 4 << 20
"""Of each pipe of the page server of `criu dump --lazy-pages`; only CAP_SYS_RESOURCE exceeds the limit."""


@cache
def command() -> tuple[str, ...]:
    """Return the command that runs CRIU, fetched on first use and kept.

    Raises:
        UnobtainableError: with the reason.
    """
    if os.geteuid() != 0:
        raise UnobtainableError("CRIU needs root")
    if os.uname().machine != "x86_64":
        raise UnobtainableError("the packages are known for x86_64 only")
    root = unpacked("criu", SUITE, PACKAGES)
    libraries = str(root / LIBRARIES)
    found = (f"{libraries}/ld-linux-x86-64.so.2", "--library-path", libraries, str(root / "usr/sbin/criu"))
    result = subprocess.run([*found, "--version"], capture_output=True, text=True, check=False, timeout=60)
    if result.returncode:
        raise UnobtainableError(f"criu does not run: {result.stderr.strip()[-300:]}")
    return found


@cache
def subject_program() -> Path:
    """Build the process that is checkpointed: static, so that nothing of it is mapped from the system's files."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise UnobtainableError("no C compiler")
    built = cache_directory() / f"subject-{hashlib.sha256(SUBJECT.read_bytes()).hexdigest()[:16]}"
    if not built.exists():
        with tempfile.NamedTemporaryFile(dir=built.parent, delete=False) as file:
            pass
        options = ["-static", "-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([compiler, *options, "-o", file.name, SUBJECT], check=True)
        Path(file.name).chmod(0o755)
        Path(file.name).rename(built)
    return built


def word(page: int, index: int = 0) -> int:
    """Return what the subject has put into a word of its memory, when it was started with `scan`."""
    return (page * 512 + index + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1


def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait until `condition()` is true; `what` is the complaint."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"in {seconds} s: no {what}")
        time.sleep(0.002)


def tail(path: Path, lines: int = 15) -> str:
    """Return the end of a log."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return str(error)


def _has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    return bool(int(status.split("CapEff:")[1].split()[0], 16) >> number & 1)


@contextlib.contextmanager
def large_pipes() -> Iterator[None]:
    """Allow pipes of 4 MiB, for the time of a test: without CAP_SYS_RESOURCE `dump --lazy-pages` cannot make them.

    With it nothing is changed: a test beside this one would take the change for what it has to put back.
    """
    if _has_capability(CAP_SYS_RESOURCE):
        yield
        return
    knob = Path("/proc/sys/fs/pipe-max-size")
    before = knob.read_text()
    try:
        if int(before) < PIPE_SIZE:
            knob.write_text(str(PIPE_SIZE))
    except OSError as error:
        raise UnobtainableError(f"fs.pipe-max-size cannot be raised: {error}") from error
    try:
        yield
    finally:
        knob.write_text(before)


@attrs.define(eq=False)
class Checkpoint:
    """One process (tree) that is started, checkpointed once and restored once, with all its files in a directory.

    A context manager that kills whatever is left.

    Attributes:
        directory: what the subject reads and writes, the images (`images`) and the logs.
        pid: of the subject; the same before and after.
    """

    directory: Path
    pid: int = 0
    _mine: list[subprocess.Popen[bytes]] = attrs.field(factory=list)
    _namespace: bool = False

    @property
    def images(self) -> Path:
        """Where the images are; CRIU's work directory as well, with the socket in it."""
        return self.directory / "images"

    def start(self, mode: str, mebibytes: int = 64) -> None:
        """Start the subject, and wait until its memory is filled."""
        self.start_program([str(subject_program()), mode, str(self.directory), str(mebibytes)], {})
        until((self.directory / "ready").exists, "subject that is ready")

    def start_program(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        """Start any program as the subject, as leader of a session of its own."""
        self.images.mkdir()
        with Path(os.devnull).open("r+b") as null:
            subject = subprocess.Popen(
                arguments, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/", env=environment
            )
        self._mine.append(subject)
        self.pid = subject.pid

    def _criu(self, verb: str, *arguments: str, prefix: Sequence[str] = (), descriptors: Sequence[int] = ()) -> int:
        """Start CRIU in the background; return the index of its process."""
        common = ["-D", str(self.images), "-o", f"{verb}.log", "-v4"]
        with (self.directory / f"{verb}.stderr").open("wb") as errors:
            process = subprocess.Popen(
                [*prefix, *command(), verb, *common, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=descriptors,
                start_new_session=True,
            )
        self._mine.append(process)
        return len(self._mine) - 1

    def _finish(self, index: int, verb: str, seconds: float) -> None:
        try:
            status = self._mine[index].wait(seconds)
        except subprocess.TimeoutExpired:
            status = -1
        if status:
            raise AssertionError(
                f"criu {verb} ended with {status} (-1: not in {seconds} s)\n"
                f"{tail(self.images / f'{verb}.log')}\n{tail(self.directory / f'{verb}.stderr')}"
            )

    def dump(self, *arguments: str) -> None:
        """Checkpoint the subject into local images; it is gone afterwards."""
        before = {self.pid} | descendants(self.pid)
        self._finish(self._criu("dump", "-t", str(self.pid), *arguments), "dump", 60)
        self._mine[0].wait(60)
        # Its pids are wanted again: the tasks below it are reaped by init, in its own time.
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before), "end of what was dumped")

    def wait_dumped(self) -> None:
        """Wait until the subject, which somebody else dumps, is gone."""
        self._mine[0].wait(60)

    def dump_to_server(self, port: int) -> subprocess.Popen[bytes]:
        """Checkpoint the subject, but let `criu dump` keep the lazy pages and serve them at 127.0.0.1; return it.

        Until they are fetched the subject stays, frozen, and so do its pids: it is restored in a pid namespace.
        """
        reading, writing = os.pipe()
        try:
            self._criu(
                *("dump", "-t", str(self.pid), "--lazy-pages", "--address", "127.0.0.1", "--port", str(port)),
                *("--status-fd", str(writing)),
                descriptors=[writing],
            )
            os.close(writing)
            writing = -1
            os.set_blocking(reading, False)
            dump = self._mine[-1]
            until(lambda: _read(reading) or dump.poll() is not None, "page server", 60)
            if dump.poll() is not None:
                self._finish(len(self._mine) - 1, "dump", 1)
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)
        self._namespace = True
        return dump

    def go(self) -> None:
        """Let the subject begin, now or as soon as it is restored."""
        (self.directory / "go").touch()

    def lazy_pages(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start CRIU's own daemon; return when it listens."""
        daemon = self._mine[self._criu("lazy-pages", *arguments)]
        self.await_socket(daemon)
        return daemon

    def await_socket(self, daemon: subprocess.Popen[bytes]) -> None:
        """Wait until a daemon listens."""
        path = self.images / "lazy-pages.socket"
        until(lambda: path.exists() or daemon.poll() is not None, "socket of the daemon")
        assert daemon.poll() is None, f"the daemon ended: {tail(self.images / 'lazy-pages.log')}"

    def restore(self, *arguments: str, lazy: bool = True) -> subprocess.Popen[bytes]:
        """Restore the subject; CRIU stays its parent, and ends with it."""
        prefix = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] if self._namespace else []
        lazily = ["--lazy-pages"] if lazy else []
        return self._mine[self._criu("restore", *lazily, *arguments, prefix=prefix)]

    def results(self, seconds: float = 60.0) -> list[list[str]]:
        """Wait for the end of the subject's work; return the words of the lines that it has written.

        Raises:
            AssertionError: a wrong byte, or not done in time, with the ends of the logs.
        """
        path = self.directory / "results"

        def lines() -> list[str]:
            return path.read_text().splitlines() if path.exists() else []

        try:
            until(lambda: "done" in lines() or any(line[:2] != "ok" for line in lines()), "result", seconds)
            found = lines()
            assert found[-1] == "done", found
        except AssertionError as error:
            logs = "\n".join(f"{log.name}:\n{tail(log)}" for log in self.images.glob("*.log"))
            raise AssertionError(f"{error}\n{lines()}\n{logs}") from error
        return [line.split() for line in found[:-1]]

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
        """Wait for the good end of a process of CRIU's."""
        index = self._mine.index(process)
        verb = next(word for word in process.args if word in ("dump", "lazy-pages", "restore"))  # type: ignore[union-attr]
        self._finish(index, str(verb), seconds)

    def __enter__(self) -> Checkpoint:
        # The pids of what was dumped are wanted again: init reaps orphans, and this process does not.
        adopt_orphans(False)
        return self

    def __exit__(self, *error: object) -> None:
        adopt_orphans()
        for process in reversed(self._mine):
            family = {process.pid} | descendants(process.pid) if process.poll() is None else set()
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(60)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1)
    except BlockingIOError:
        return b""
