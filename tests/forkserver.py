"""Performs scenarios in child processes: forked from one that has imported already what they need, or in a fresh one.

An interpreter that imports the package, pytest and a test module takes 0.4 s of processor time; a fork takes 10 ms.
The server has one thread, and has opened nothing of the package's, so that its children are like fresh interpreters.
"""

from __future__ import annotations

import ast
import asyncio
import atexit
import contextlib
import faulthandler
import importlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from processes import KEPT, unmeasured

if TYPE_CHECKING:
    from collections.abc import Callable

Request = dict[str, Any]
"""directory, module and function: what is called; arguments: their repr; deadline: seconds; loop: its factory's name;
environment and cwd: the process's."""


class ForkServer:
    """A process that forks at a request; it ends with the one that has started it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # A thread of a library's would not be there in a child. What is measured is each child, not their parent.
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=theirs.fileno(),
                env={**unmeasured(), "OPENBLAS_NUM_THREADS": "1"},
            )
        KEPT.add(self._process.pid)
        atexit.register(self._end)

    def _end(self) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, request: Request, output: int, errors: int) -> tuple[int, Callable[[], int]]:
        """Perform the request in a forked child with these standard streams, in a session of its own.

        Return its pid, and what waits for its end: it returns the exit status, or the signal's number, negative.
        """
        reading, writing = os.pipe()
        answers = os.fdopen(reading)
        with os.fdopen(writing):
            socket.send_fds(self._socket, [json.dumps(request).encode()], [output, errors, writing])

        def wait() -> int:
            with answers:
                return int(answers.readline())

        return int(answers.readline()), wait


def perform(request: Request) -> None:
    """Call the function in this process."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(request["deadline"] - 1, exit=True)
    module = _module(request)
    result = getattr(module, request["function"])(*ast.literal_eval(request["arguments"]))
    if inspect.iscoroutine(result):
        from blocking import loop_factories

        with asyncio.Runner(loop_factory=loop_factories()[request["loop"]]) as runner:
            runner.run(result)


def _module(request: Request) -> Any:
    if request["directory"] not in sys.path:
        sys.path.insert(0, request["directory"])
    return importlib.import_module(request["module"])


def _serve(requests: socket.socket) -> Request:
    """Fork a child for each request, and return in the child."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children that wait for children
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        request: Request = json.loads(message)
        with contextlib.suppress(Exception):  # it is raised again where it can be read: in the child
            _module(request)
        if "COVERAGE_PROCESS_START" in request["environment"]:
            import coverage  # noqa: F401 - 70 ms for each child
        if os.fork() == 0:
            requests.close()
            if _forked(descriptors.pop()):
                _become(request, descriptors)
                return request
        for descriptor in descriptors:
            os.close(descriptor)


def _forked(answers: int) -> bool:
    """Fork: return True in the child, whose parent says there how it has ended, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        os.close(answers)
        return True
    os.write(answers, f"{pid}\n".encode())
    os.closerange(0, answers)  # readers of what the child writes wait until the last one that could has closed
    os.write(answers, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def _become(request: Request, streams: list[int]) -> None:
    """Become like a process that was started with this environment, directory and these standard streams."""
    os.setsid()
    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if "COVERAGE_PROCESS_START" in os.environ:
        import coverage

        coverage.process_startup()


if __name__ == "__main__":
    import aiouffd.native  # noqa: F401 - what most children need

    perform(json.loads(sys.argv[1]) if sys.argv[1:] else _serve(socket.socket(fileno=os.dup(0))))
