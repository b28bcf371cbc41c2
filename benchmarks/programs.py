"""Real programs that CRIU restores lazily: when the first client has its answer, and when the daemon has ended.

They listen at Unix sockets: CRIU 4.1 cannot dump TCP sockets on Linux 6.16 and later, where they have no SO_PASSCRED.
"""

from __future__ import annotations

import os
import platform
import select
import shutil
import socket
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from benchmarks.served import PERF_FORGETS, Daemon, criu_rig, debian_packages, remembering

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence

PATIENCE = 60.0
HTTP = (b"GET / HTTP/1.0\r\n\r\n", b"200 OK")
NGINX = """
daemon off; user root; worker_processes 1; pid {directory}/pid; error_log {directory}/log; events {{}}
http {{
    access_log off; client_body_temp_path {directory}/1; proxy_temp_path {directory}/2; fastcgi_temp_path {directory}/3;
    uwsgi_temp_path {directory}/4; scgi_temp_path {directory}/5;
    server {{ listen unix:{directory}/listening; location / {{ return 200 "yes"; }} }}
}}
"""
NODE = """
const all = []
for (let i = 0; i < 300000; i++) all.push({{ number: i, text: 'value ' + i }})
require('http').createServer((_, answer) => answer.end(all[200000].text)).listen('{directory}/listening')
"""
JAVA = """
import java.net.*;
import java.nio.ByteBuffer;
import java.nio.channels.*;
import java.util.*;

class Values {{
    public static void main(String[] arguments) throws Exception {{
        Map<Integer, String> all = new HashMap<>();
        for (int i = 0; i < 300000; i++) all.put(i, "value " + i);
        var listening = ServerSocketChannel.open(StandardProtocolFamily.UNIX);
        listening.bind(UnixDomainSocketAddress.of("{directory}/listening"));
        while (true) {{
            try (var client = listening.accept()) {{
                client.read(ByteBuffer.allocate(4096));
                client.write(ByteBuffer.wrap(("HTTP/1.0 200 OK\\r\\n\\r\\n" + all.get(200000)).getBytes()));
            }}
        }}
    }}
}}
"""


@attrs.frozen
class Program:
    """A server.

    Attributes:
        packages: of Debian, that have it and what it needs; none: it is used where it is installed.
        arguments: with `{directory}` for one of its own, where it listens at `listening` and finds `configuration`.
        asked: the request whose answer is waited for, and what the answer contains.
        filled: likewise, sent once at first.
        configuration: the text of that file.
    """

    packages: tuple[str, ...]
    arguments: tuple[str, ...]
    asked: tuple[bytes, bytes]
    filled: tuple[bytes, bytes] | None = None
    configuration: str = ""


PROGRAMS = {
    "redis-server": Program(
        ("redis-tools", "redis-server", "libjemalloc2", "liblzf1"),
        ("--port", "0", "--unixsocket", "{directory}/listening", "--save", "", "--enable-debug-command", "local"),
        (b"GET key:200000\r\n", b"value:200000"),
        (b"DEBUG POPULATE 300000 key 100\r\n", b"OK"),
    ),
    "nginx": Program(
        ("nginx",), ("-p", "{directory}", "-e", "{directory}/log", "-c", "{directory}/configuration"), HTTP, None, NGINX
    ),
    "node": Program((), ("{directory}/configuration",), HTTP, None, NODE),
    "java": Program(
        (), ("-Xmx128m", "-XX:-UsePerfData", "--source", "17", "{directory}/configuration"), HTTP, None, JAVA
    ),
}


@cache
def found(name: str) -> tuple[str, str]:
    """Return a program's path and the directory of its libraries: the system's, or unpacked beside it.

    Raises:
        UnobtainableError: with the reason.
    """
    installed = shutil.which(name)
    if installed is not None:
        return installed, ""
    packages = PROGRAMS[name].packages
    if not packages:
        raise debian_packages.UnobtainableError(f"{name} is not installed")
    root = debian_packages.unpacked(name, platform.freedesktop_os_release()["VERSION_CODENAME"], packages)
    path = shutil.which(name, path=f"{root}/usr/sbin:{root}/usr/bin")
    if path is None:
        raise debian_packages.UnobtainableError(f"the packages {', '.join(packages)} have no {name}")
    return path, str(root / criu_rig.LIBRARIES)


def unavailable(name: str) -> str | None:
    """Return why a program cannot be restored here, or None."""
    try:
        criu_rig.command()
        found(name)
    except (debian_packages.UnobtainableError, OSError, KeyError) as error:
        return str(error)
    return None


def ask(path: Path, asked: tuple[bytes, bytes]) -> None:
    """Ask until there is an answer: the program may not have its socket yet."""
    request, expected = asked
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                client.connect(str(path))
                client.sendall(request)
                answer = client.recv(4096)
            if expected in answer:
                return
            raise AssertionError(f"{path.name}: {answer!r}")
        except (ConnectionError, FileNotFoundError):
            if time.monotonic() > end:
                raise
        time.sleep(0.0002)


def start(name: str, checkpoint: criu_rig.Checkpoint) -> Path:
    """Start a program and have it answer; return its socket."""
    program, (path, libraries) = PROGRAMS[name], found(name)
    directory = checkpoint.directory
    (directory / "configuration").write_text(program.configuration.format(directory=directory))
    arguments = [argument.format(directory=directory) for argument in program.arguments]
    # CRIU cannot dump an io_uring, which node would use.
    environment = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": libraries, "UV_USE_IO_URING": "0"}
    checkpoint.start_program([path, *arguments], environment)
    listening = directory / "listening"
    for asked in (program.filled, program.asked):
        if asked is not None:
            ask(listening, asked)
    return listening


def answered(name: str, daemon: Daemon) -> tuple[float, float]:
    """Restore a program once; return the milliseconds until a client has its answer, and until the daemon has ended."""
    remembering()
    with tempfile.TemporaryDirectory() as directory, criu_rig.Checkpoint(Path(directory)) as checkpoint:
        listening = start(name, checkpoint)
        checkpoint.dump()
        with daemon(checkpoint) as serving:
            time.sleep(PERF_FORGETS)
            ends: list[float] = []
            waiting = threading.Thread(target=wait_for_end, args=(serving, ends))
            waiting.start()
            began = time.perf_counter()
            checkpoint.restore()
            ask(listening, PROGRAMS[name].asked)
            answer = time.perf_counter() - began
            waiting.join()
            ask(listening, PROGRAMS[name].asked)
    return answer * 1e3, (ends[0] - began) * 1e3


def wait_for_end(process: subprocess.Popen[bytes], ends: list[float]) -> None:
    """Note when a process has ended. Popen.wait with a limit looks only now and then."""
    pidfd = os.pidfd_open(process.pid)
    if select.select([pidfd], [], [], PATIENCE)[0]:
        ends.append(time.perf_counter())
    os.close(pidfd)


def figures(name: str, daemon: Daemon) -> Sequence[Callable[[], float]]:
    """Return two contestants: the answer and the end. The second uses the restores that the first has made."""
    kept: list[float] = []

    def answer() -> float:
        first, end = answered(name, daemon)
        kept.append(end)
        return first

    return answer, lambda: kept.pop(0) if kept else answered(name, daemon)[1]
