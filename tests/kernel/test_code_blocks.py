"""The Python code of README.md and docs/: the blocks of a document run one after the other, as one program.

Comments that begin with `<!-- setup` hold code that a reader need not see. `https://host` is a page server.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest
from scenario import play

from examples.page_server import serving

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if "```python" in path.read_text()]
CODE = re.compile(r"<!-- setup\n(.*?)-->|```python\n(.*?)```", re.DOTALL)


def run_blocks(name: str, directory: str) -> None:
    """Scenario."""
    os.chdir(directory)
    text = Path(name).read_text()
    blocks = [(text[: found.start()].count("\n") + 1, (found[1] or found[2])) for found in CODE.finditer(text)]

    async def program(url: str) -> None:
        names: dict[str, object] = {"__name__": "__main__"}
        for line, code in blocks:
            code = "\n" * line + code.replace("https://host", url)  # noqa: PLW2901 - so that errors name the line
            compiled = compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(compiled, names)
            if inspect.isawaitable(result):
                await result

    with serving(Path(directory)) as url:
        asyncio.run(program(url))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_code_runs(document: Path, tmp_path: Path) -> None:
    """It ends without an exception; the files that it names are a quarter of a gigabyte."""
    with (tmp_path / "weights.bin").open("wb") as file:
        file.write(np.arange(1 << 20, dtype=np.uint32).tobytes())
        file.truncate(256 << 20)
    play(run_blocks, str(document), str(tmp_path))


def test_each_document_with_code_is_run() -> None:
    """The list is not empty by accident."""
    assert {"README.md", "guide.md", "engines.md", "kernel.md"} <= {path.name for path in DOCUMENTS}
