"""`aiouffd lazy-pages` with CRIU itself: a process, and a tree of them, checked word by word after the restore."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import criu_rig
import debian_packages
import pytest
from processes import crash
from scenario import play
from served import free_port

from aiouffd.criu.lazy_pages import LazyPages
from aiouffd.engine.options import Options
from aiouffd.pager.process.deaths import DEATHS

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def rig() -> None:
    """CRIU is fetched on first use."""
    try:
        criu_rig.command()
    except debian_packages.UnobtainableError as error:
        pytest.skip(f"CRIU cannot be had: {error}")


class Daemon:
    """A running `aiouffd lazy-pages`."""

    def __init__(self, checkpoint: criu_rig.Checkpoint, *arguments: str) -> None:
        self.log = checkpoint.images / "aiouffd.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(checkpoint.images), *arguments],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        checkpoint.await_socket(self.process)

    @property
    def said(self) -> str:
        """Its log."""
        return self.log.read_text()

    def ends_by(self, number: signal.Signals, said: str) -> None:
        """Send a signal; it ends with status 1, and says what that costs, without a traceback."""
        self.process.send_signal(number)
        assert self.process.wait(60) == 1
        assert said in self.said
        assert "Traceback" not in self.said

    def worker(self) -> int:
        """Return the pid of its worker, 0 where there is none now."""
        with contextlib.suppress(OSError, IndexError):
            keeper = self.said.split("pager ", 1)[1].split('"', 1)[0]
            return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
        return 0


@contextlib.contextmanager
def lazily(checkpoint: criu_rig.Checkpoint, *arguments: str) -> Iterator[Daemon]:
    """Run the daemon; it ends well by itself."""
    daemon = Daemon(checkpoint, *arguments)
    try:
        yield daemon
        assert daemon.process.wait(60) == 0, daemon.said
        assert "all pages are there" in daemon.said
    except BaseException:
        sys.stderr.write(daemon.said)
        raise
    finally:
        daemon.process.kill()
        daemon.process.wait()


@pytest.mark.parametrize("background", [True, False], ids=["background", "on-demand"])
@pytest.mark.parametrize(("mode", "size"), [("scan", 64), ("tree", 16)])
def test_from_images(tmp_path: Path, mode: str, size: int, background: bool) -> None:
    """No wrong word; the tree forks, moves, drops and unmaps after the restore."""
    with criu_rig.Checkpoint(tmp_path) as checkpoint:
        checkpoint.start(mode, size)
        checkpoint.dump()
        with lazily(checkpoint, "--background" if background else "--no-background"):
            restore = checkpoint.restore()
            checkpoint.go()
            checkpoint.results()
            checkpoint.finish(restore)


@pytest.mark.parametrize(("mode", "size"), [("scan", 64), ("tree", 16)])
def test_from_a_page_server(tmp_path: Path, mode: str, size: int) -> None:
    """The lazy pages stay with the dump; it ends well when all are there."""
    port = free_port()
    with criu_rig.large_pipes(), criu_rig.Checkpoint(tmp_path) as checkpoint:
        checkpoint.start(mode, size)
        checkpoint.dump_to_server(port)
        with lazily(checkpoint, "--page-server", "127.0.0.1", "--port", str(port)):
            restore = checkpoint.restore()
            checkpoint.go()
            checkpoint.results()
            checkpoint.finish(restore)


@pytest.mark.parametrize("mode", ["scan", "tree"])
def test_the_example(tmp_path: Path, mode: str) -> None:
    """`examples/lazy_restore.py` checkpoints a process, or a tree, and restores it: no wrong word."""
    example = Path(__file__).parent.parent.parent / "examples" / "lazy_restore.py"
    with criu_rig.Checkpoint(tmp_path) as checkpoint:
        checkpoint.start(mode, 16)
        with subprocess.Popen(
            [sys.executable, example, str(checkpoint.pid), checkpoint.images, "--criu", " ".join(criu_rig.command())],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as running:  # fmt: skip
            checkpoint.wait_dumped()
            checkpoint.go()
            said, errors = running.communicate(timeout=60)
        try:
            assert running.returncode == 0, errors
            assert "all its memory is there" in said
            checkpoint.results()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(checkpoint.pid, signal.SIGKILL)  # nobody's child any more


def test_no_images(tmp_path: Path) -> None:
    """It does not wait for a restore that cannot be."""
    done = subprocess.run(
        [sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "has no images of a process" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_page_servers_pages_are_brought_before_it_ends(tmp_path: Path) -> None:
    """They come through this process: SIGTERM is told, and answered when all is there."""
    port = free_port()
    with criu_rig.large_pipes(), criu_rig.Checkpoint(tmp_path) as checkpoint:
        checkpoint.start("scan", 64)
        checkpoint.dump_to_server(port)
        with lazily(checkpoint, "--page-server", "127.0.0.1", "--port", str(port)) as daemon:
            daemon.process.send_signal(signal.SIGTERM)
            criu_rig.until(lambda: "a second signal loses them" in daemon.said, "word of the signal")
            restore = checkpoint.restore()
            checkpoint.go()
            checkpoint.results()
            checkpoint.finish(restore)


def test_a_second_signal_gives_the_page_servers_pages_up(tmp_path: Path) -> None:
    """It ends, though the page server does not answer, and says what that costs. No traceback."""
    port = free_port()
    with criu_rig.large_pipes(), criu_rig.Checkpoint(tmp_path) as checkpoint:
        checkpoint.start("scan", 1)
        dump = checkpoint.dump_to_server(port)
        daemon = Daemon(checkpoint, "--page-server", "127.0.0.1", "--port", str(port))
        daemon.process.send_signal(signal.SIGTERM)
        criu_rig.until(lambda: "a second signal loses them" in daemon.said, "word of the first signal")
        dump.send_signal(signal.SIGSTOP)
        daemon.ends_by(signal.SIGINT, "SIGINT: missing pages are lost")


def test_a_signal_before_anybody_has_come(tmp_path: Path) -> None:
    """It ends, and speaks of no pager that serves on. No traceback."""
    with criu_rig.Checkpoint(tmp_path) as checkpoint:
        checkpoint.start("scan", 1)
        checkpoint.dump()
        daemon = Daemon(checkpoint)
        daemon.ends_by(signal.SIGTERM, "SIGTERM: no process has come")


@pytest.mark.unmeasured
def test_while_the_worker_is_killed(tmp_path: Path) -> None:
    """Page by page, with kills in between: no wrong word."""
    with criu_rig.Checkpoint(tmp_path) as checkpoint:
        checkpoint.start("tree", 16)
        checkpoint.dump()
        with lazily(checkpoint, "--no-background", "--readahead", "0") as daemon:
            restore = checkpoint.restore()
            checkpoint.go()
            kills = 0  # five without a fault in between would end it, as they should
            while restore.poll() is None and kills < 4 and not (tmp_path / "results").exists():
                if worker := daemon.worker():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
                    kills += 1
                criu_rig.until(functools.partial(replaced, daemon, restore, kills), "worker")
            checkpoint.results()
            checkpoint.finish(restore)
            assert kills >= 1


@pytest.mark.parametrize("where", ["images", "page server"])
def test_while_the_worker_is_killed_and_all_is_brought(tmp_path: Path, where: str) -> None:
    """As it is used: all comes in the background, from before the process runs on; kills in between, no wrong word."""
    with contextlib.ExitStack() as stack:
        arguments: list[str] = []
        if where == "page server":
            arguments = ["--page-server", "127.0.0.1", "--port", str(free_port())]
            stack.enter_context(criu_rig.large_pipes())
        checkpoint = stack.enter_context(criu_rig.Checkpoint(tmp_path))
        checkpoint.start("scan", 64)
        if arguments:
            checkpoint.dump_to_server(int(arguments[-1]))
        else:
            checkpoint.dump()
        daemon = stack.enter_context(lazily(checkpoint, *arguments))
        restore = checkpoint.restore()
        checkpoint.go()
        kills = 0
        for text in ("lazy pages in", "is replaced", "restored: "):
            criu_rig.until(functools.partial(says, daemon, text), text)
            if worker := daemon.worker():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                    kills += 1
        checkpoint.results()
        checkpoint.finish(restore)
        assert kills >= 1


def test_a_pager_that_is_given_up(tmp_path: Path) -> None:
    """Five workers that serve nothing: the daemon says so and ends, instead of waiting for ever."""
    with criu_rig.Checkpoint(tmp_path) as checkpoint:
        checkpoint.start("scan", 16)
        checkpoint.dump()
        daemon = Daemon(checkpoint, "--no-background")
        try:
            checkpoint.restore()
            criu_rig.until(functools.partial(says, daemon, "restored: "), "restore")
            for deaths in range(1, 12):  # the restored process may have a fault resolved between the first ones
                criu_rig.until(lambda: daemon.worker() or daemon.process.poll() is not None, "worker")
                if worker := daemon.worker():
                    crash(worker)
                criu_rig.until(functools.partial(died, daemon, deaths), "death")
                if deaths >= DEATHS and says(daemon, "workers died with no fault"):
                    break
            assert daemon.process.wait(60) == 1
            assert "workers died with no fault resolved between them" in daemon.said
            assert "Traceback" not in daemon.said
        finally:
            daemon.process.kill()
            daemon.process.wait()


def died(daemon: Daemon, times: int) -> bool:
    """Tell whether so many workers have died, or all is over."""
    return daemon.said.count("died (signal") >= times or daemon.process.poll() is not None


def says(daemon: Daemon, text: str) -> bool:
    """Tell whether it has said so, or has ended."""
    return text in daemon.said or daemon.process.poll() is not None


def replaced(daemon: Daemon, restore: subprocess.Popen[bytes], kills: int) -> bool:
    """Tell whether so many workers were replaced, or all is over."""
    return daemon.said.count("is replaced") >= kills or restore.poll() is not None


def test_images_that_are_not_there(tmp_path: Path) -> None:
    """A restore that fails, and a directory that is none: an error that names it."""
    done = subprocess.run(
        [sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(tmp_path / "none")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    (tmp_path / "mm-1.img").touch()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = str(closed.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(tmp_path),
             "--page-server", "127.0.0.1", "--port", port],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_restore_that_fails(tmp_path: Path) -> None:
    """The connection ends before the end mark: said so, with a status."""
    (tmp_path / "mm-1.img").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    path = tmp_path / "lazy-pages.socket"
    criu_rig.until(path.exists, "socket")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.send(b"\1\0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "before the end mark" in errors
    assert "Traceback" not in errors
    assert not path.exists()


async def listening(directory: str) -> None:
    """Scenario: a daemon is started, and ended when it is ready."""
    path = Path(directory) / "lazy-pages.socket"
    seen: list[bool] = []
    ready = asyncio.Event()

    async def look(_: LazyPages, __: object) -> None:
        seen.append(path.exists())

    LazyPages._prepare = look  # type: ignore[assignment]
    service = asyncio.create_task(LazyPages(directory, options=Options()).run(ready.set))
    await ready.wait()
    assert seen == [False]
    assert path.is_socket()
    service.cancel()
    await asyncio.wait([service])
    assert not path.exists()


def test_whoever_finds_the_socket_is_served_at_once(tmp_path: Path, loop: str) -> None:
    """It is made when all else is ready."""
    (tmp_path / "mm-1.img").touch()
    play(listening, str(tmp_path), loop=loop)
