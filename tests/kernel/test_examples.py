"""The examples, as a user runs them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import criu_rig
import numpy as np
import pytest
from ran import EXAMPLES, example, goes_on
from scenario import eventually

from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_explains_itself(name: str) -> None:
    """`--help` describes it and each of its options."""
    output = example(name, "--help")
    assert output.startswith("usage: ")
    assert not re.search(r"^  -\S+( \S+)?$\n(?!    )", output, re.MULTILINE), "an option without a help text"


def test_example_lazy_array() -> None:
    """It touches a little of what it serves itself and fetches not much more."""
    output = example("lazy_array.py")
    assert (
        f"the sum of the last 100,000: {sum(sum(n.to_bytes(4, 'little')) for n in range((1 << 24) - 25000, 1 << 24))}"
        in output
    )
    fetched = re.search(r"([\d,]+) bytes fetched", output)
    assert fetched is not None
    assert int(fetched[1].replace(",", "")) < (64 << 20) / 3


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A page server of the examples with a file."""
    (tmp_path / "model.bin").write_bytes(bytes(range(256)) * 4096)
    with serving(tmp_path) as root:
        yield f"{root}/model.bin"


def test_example_lazy_array_of_a_url(url: str) -> None:
    """The file that is named is the one that is used."""
    assert "the byte in the middle: 0\n" in example("lazy_array.py", url)


def test_example_safetensors() -> None:
    """A tensor of the middle is right, and most of the file was not fetched."""
    output = example("safetensors_lazy.py")
    assert "the mean of layers.5.weight is 5.0" in output
    fetched, size = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) of ([\d,]+) bytes", output)[0])
    assert fetched < size / 3


def test_example_model_loader() -> None:
    """A worker has its part of each tensor, and fetches no more than the pages of these parts, and headers."""
    output = example("model_loader.py", "--rank", "3", "--workers", "4")
    for layer in range(8):
        rows = sum(layer + row / 1024 for row in range(768, 1024))
        assert re.search(rf"layers\.{layer}\.weight +sum of this worker's part: {rows * 1024:.0f}\.\d", output)
    fetched, size = fetched_of(output)
    assert size > 32 << 20
    assert fetched <= 8 * (1 << 20) + 8 * 4096 * 3 + 2 * 4096


def fetched_of(output: str) -> tuple[int, int]:
    """Return what an example says of bytes: how many were fetched, and of how many."""
    found = re.findall(r"([\d,]+) of ([\d,]+) bytes fetched", output)
    fetched, size = (int(number.replace(",", "")) for number in found[-1])
    return fetched, size


def test_example_embeddings() -> None:
    """Rows are right: each is nearest to itself. No more is fetched than the pages that they are on, and the header."""
    output = example("embeddings.py")
    assert re.search(r"row +(\d+): 1\.000 beside row \1\n", output)
    fetched, size = fetched_of(output)
    assert fetched <= 100 * 2 * 4096 + (64 << 10)
    assert size > 128 << 20


def test_example_embeddings_of_a_url(tmp_path: Path) -> None:
    """The rows that are named, of a table that numpy has saved in another order and type."""
    np.save(tmp_path / "table.npy", np.asfortranarray(np.eye(300, dtype=np.float64)))
    with serving(tmp_path) as root:
        output = example("embeddings.py", f"{root}/table.npy", "7", "299")
    assert "row        7: 1.000 beside row 7\nrow      299: 0.000 beside row 7\n" in output


def test_example_embeddings_of_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page server stands for a store that speaks S3."""
    (tmp_path / "bucket").mkdir()
    np.save(tmp_path / "bucket" / "table.npy", np.eye(300, dtype=np.float32))
    with serving(tmp_path) as root:
        for name, value in {"ENDPOINT_URL": root, "ALLOW_HTTP": "true", "SKIP_SIGNATURE": "true"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        assert "row       11: 1.000 beside row 11\n" in example("embeddings.py", "s3://bucket/table.npy", "11")


def test_example_resume_simulation() -> None:
    """Both resumed runs are in the checkpoint; little of it was read, and less written."""
    output = example("resume_simulation.py")
    assert "4000 visits are in the checkpoint, which is right" in output
    runs = re.findall(r"([\d,]+) bytes read and ([\d,]+) written", output)
    assert len(runs) == 2
    for run in runs:
        read, written = (int(number.replace(",", "")) for number in run)
        assert 0 < written < read < (64 << 20) / 3


def test_example_checkpoint_simulation() -> None:
    """A program that is killed while it writes checkpoints goes on to the same end."""
    goes_on("checkpoint_simulation.py")


def test_example_external_sort() -> None:
    """All numbers, in order, with less memory than they take."""
    output = example("external_sort.py")
    assert "the output is sorted" in output
    assert "8,388,608 numbers (64 MiB) in 8 runs" in output
    more = re.search(r"(\d+) MiB of memory more", output)
    assert more is not None
    assert int(more[1]) < 48


def test_example_external_sort_of_a_file(tmp_path: Path) -> None:
    """Numbers that occur again and again, and a run that is shorter than the others."""
    numbers = np.random.default_rng(3).integers(0, 9, 300_001)
    numbers.tofile(tmp_path / "input")
    example("external_sort.py", tmp_path / "input", tmp_path / "output", "--memory", "1")
    assert np.array_equal(np.fromfile(tmp_path / "output", np.int64), np.sort(numbers))


def limited(folder: Path, limit: int) -> Path:
    """Return a new cgroup, with so many bytes of memory; skip where there is none to be made."""
    for parent, name in ((Path("/sys/fs/cgroup/memory"), "limit_in_bytes"), (Path("/sys/fs/cgroup"), "max")):
        group = parent / f"aiouffd-{folder.name}-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / f"memory.{name}").write_text(str(limit))
        except OSError:
            group.rmdir()
        else:
            return group
    pytest.skip("no cgroup with a memory limit can be made here")


def test_example_sort_what_does_not_fit(tmp_path: Path) -> None:
    """A file of 128 MiB is sorted in place where less memory than that may be used: by program, pager and caches."""
    group = limited(tmp_path, 112 << 20)
    code = f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))"
    script = str(EXAMPLES / "sort_what_does_not_fit.py")
    arguments = [script, "--size", "128", "--memory", "16"]
    code += f"; os.execv({sys.executable!r}, {[sys.executable, *arguments]!r})"
    try:
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=200)
    finally:
        eventually((group / "cgroup.procs").read_text, "")  # the pager ends a little later
        group.rmdir()
    assert done.returncode == 0, done.stderr
    assert "the file is sorted" in done.stdout
    assert re.search(r"128 MiB came, 128 MiB were written, [678] MiB are there", done.stdout)


def test_example_prefork() -> None:
    """Each worker has what was warmed up, and a layer of its own."""
    output = example("prefork.py")
    for number in range(4):
        assert re.search(rf"worker {number}: 1 after [\d.]+ ms, {number + 2} of its own layer\n", output)
    assert "4 workers have answered" in output


def test_example_moe_experts() -> None:
    """What is fetched are the experts that were chosen, and the routers; the result is that of the whole model."""
    output = example("moe_experts.py")
    fetched, size = fetched_of(output)
    experts = int(re.findall(r"(\d+) of 64 experts", output)[-1])
    assert 0 < experts < 32
    assert fetched < experts * (256 << 10) + (256 << 10) < size
    result = re.search(r"the last result is ([\d.]+)", output)
    assert result is not None
    assert float(result[1]) == pytest.approx(21.962564, rel=1e-4)  # as computed from the file by itself


def test_example_custom_handler() -> None:
    """Squares, computed where they are touched."""
    assert f"1342177 squared is {1342177**2}" in example("custom_handler.py")


def test_example_microvm() -> None:
    """It makes the memory, serves it, and the guest reads what it made."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is missing, or not for this user")
    assert f"checksum {sum(page % 251 for page in range(2048))}, 2048 pages" in example("microvm.py", "--memory", "8")


def test_example_lazy_restore() -> None:
    """Its sample process runs on with the memory that it had."""
    with criu_rig.large_pipes():
        output = example("lazy_restore.py", "--criu", " ".join(criu_rig.command()))
    found = re.search(r"wrote (\d+) times that its memory is right, 0 that not", output)
    assert found is not None
    assert int(found[1]) > 0


def test_example_page_server() -> None:
    """Without a directory it serves a sample file; it ends with its input."""
    command = [sys.executable, str(EXAMPLES / "page_server.py"), "--until-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        assert process.stdout.readline() == f"map a file: python examples/lazy_array.py {url}/sample.bin\n"
        with urllib.request.urlopen(urllib.request.Request(f"{url}/sample.bin", method="HEAD")) as answer:
            assert answer.headers["Content-Length"] == str(64 << 20)
        process.stdin.close()
        assert process.wait(60) == 0


def test_example_notebook() -> None:
    """Its cells run in order, with `await` at their top, and print what was fetched."""
    path = EXAMPLES / "lazy_array.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    program = (
        "import ast, asyncio, sys\n"
        "asyncio.run(eval(compile(sys.argv[1], 'notebook', 'exec', ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)))"
    )
    code = "\n".join("".join(cell["source"]) for cell in cells)
    command = [sys.executable, "-c", program, code]
    result = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, (result.stdout, result.stderr)
    fetched = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) of 67,108,864 bytes", result.stdout)]
    assert fetched == sorted(fetched)
    assert fetched[0] == 0
    assert 0 < fetched[-1] < 32 << 20
    assert [cell["outputs"] for cell in cells] == [[]] * len(cells)
    assert result.stdout.count(f"{math.sin(5_000_000)}") == 2
