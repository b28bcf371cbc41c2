"""The code of README.md and docs/: the blocks of a document run one after the other, as a reader would run them.

All Python blocks of a document are one program, and each `sh` block is a script. A `text` block is what the block
before it prints; `...` stands for anything. `https://host` is a page server, and ports and sockets are the test's own.
Comments that begin with `<!-- setup` hold Python code that a reader need not see. A block whose first line is
`# needs: ...` runs where the machine has that; one that begins with `# file: NAME` is that file. `.ci/run` runs the
blocks below `<!-- command: ...`.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import importlib.util
import inspect
import io
import os
import re
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import numpy as np
import pytest
from scenario import play, until

from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"(?<!-->\n)^```(python|sh|text)\n(.*?)^```|^<!-- (setup)\n(.*?)-->", re.DOTALL | re.MULTILINE)
NEEDS: dict[str, Callable[[], bool]] = {
    "KVM": lambda: os.access("/dev/kvm", os.R_OK | os.W_OK),
    "PyArrow": lambda: importlib.util.find_spec("pyarrow") is not None,
    "PyTorch": lambda: importlib.util.find_spec("torch") is not None,
    "a bucket": lambda: True,  # the page server is one
    "pyzstd": lambda: importlib.util.find_spec("pyzstd") is not None,
    # What no test is given:
    "CRIU": lambda: False,
    "Firecracker": lambda: False,
    "a checkout": lambda: False,
    "a receiver": lambda: False,
}
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@attrs.frozen
class Block:
    """A piece of code, or of output."""

    line: int
    language: str
    text: str

    @property
    def need(self) -> str:
        """What a machine may lack."""
        return self.begins_with("needs")

    def begins_with(self, word: str) -> str:
        """Return what the first line says after a word: `# word: what`."""
        return self.text.partition("\n")[0].partition(f"# {word}: ")[2]


def blocks_of(document: Path) -> list[Block]:
    """Return what runs, in order."""
    text = document.read_text()
    return [
        Block(text[: found.start()].count("\n") + 1, found[1] or found[3], found[2] or found[4])
        for found in BLOCK.finditer(text)
    ]


DOCUMENTS = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if blocks_of(path)]


async def run_python(block: Block, name: str, names: dict[str, object]) -> str:
    """Run a block in the program `names`; return what it prints."""
    code = "\n" * block.line + block.text  # so that errors name the line
    compiled = compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        result = eval(compiled, names)
        if inspect.isawaitable(result):
            await result
    return output.getvalue()


def run_shell(block: Block, stack: contextlib.ExitStack) -> str:
    """Run a block in a shell; return what it prints. What it leaves in the background ends with `stack`."""
    with Path("output").open("w+") as output:
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        process = subprocess.Popen(command, stdout=output, start_new_session=True, env={**os.environ, "PATH": path})
        stack.callback(end_session, process.pid)
        status = process.wait()
        output.seek(0)
        assert status == 0, f"line {block.line}: status {status}"
        return output.read()


def end_session(pid: int) -> None:
    """End what a shell has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)


async def until_listening(port: int) -> None:
    """Wait until a server that a block has started takes connections."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            return writer.close()
        await asyncio.sleep(0.01)


def run_blocks(name: str, directory: str) -> None:
    """Scenario."""
    os.chdir(directory)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    own = {"/run/": f"{directory}/", "/var/cache/": f"{directory}/", "8080": port, "9177": port}

    async def program(url: str, stack: contextlib.ExitStack) -> None:
        main = sys.modules["__main__"] = types.ModuleType("__main__")  # pickles look for what the program defines
        names = vars(main)
        names |= {"until": until, "until_listening": until_listening}
        output = ""
        for block in blocks_of(Path(name)):
            if block.need and not NEEDS[block.need]():
                output = "..."
                continue
            text = block.text.replace("https://host", url)
            for public, its in own.items() if block.language != "text" else ():
                text = text.replace(public, its)
            block = attrs.evolve(block, text=text)  # noqa: PLW2901
            if block.language == "text":
                want = re.sub(r"\n\.\.\.\n\Z", "...", block.text)  # what may follow need not
                assert output == "..." or doctest.OutputChecker().check_output(want, output, SAME), (block.line, output)
            elif file := block.begins_with("file"):
                Path(file).write_text(text)
            elif block.language == "sh":
                output = await asyncio.to_thread(run_shell, block, stack)
            else:
                output = await run_python(block, name, names)

    with contextlib.ExitStack() as stack:
        url = ""
        if re.search(r"https://host|s3://", Path(name).read_text()):
            url = stack.enter_context(serving(Path(directory)))
            os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_SKIP_SIGNATURE": "true"}
        asyncio.run(program(url, stack))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_runs(document: Path, tmp_path: Path) -> None:
    """It ends without an exception and prints what it says; the file that it uses is a quarter of a gigabyte."""
    with (tmp_path / "weights.bin").open("wb") as file:
        file.write(np.arange(1 << 20, dtype=np.uint32).tobytes())
        file.truncate(256 << 20)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bucket").symlink_to(".")
    play(run_blocks, str(document), str(tmp_path))


def test_each_need_is_known() -> None:
    """And some block needs each."""
    assert {block.need for path in DOCUMENTS for block in blocks_of(path)} - {""} == set(NEEDS)


def test_a_wrong_output_is_seen(tmp_path: Path) -> None:
    """Of Python and of a shell."""
    for code in ("```python\nprint(1)\n```", "```sh\necho 1\n```"):
        (tmp_path / "page.md").write_text(f"{code}\n\n```text\n2\n```\n")
        with pytest.raises(AssertionError, match=r"\(5, '1\\n'\)"):
            play(run_blocks, str(tmp_path / "page.md"), str(tmp_path))


def test_each_document_with_code_is_run() -> None:
    """The list is not empty by accident."""
    assert {"README.md", "lazy-array.md", "engines.md", "kernel.md"} <= {path.name for path in DOCUMENTS}
