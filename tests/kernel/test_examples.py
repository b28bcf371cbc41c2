"""The examples, as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import criu_rig
import pytest

from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name: str, *arguments: str | Path) -> str:
    """Run an example; return its output."""
    command = [sys.executable, *map(str, (EXAMPLES / name, *arguments))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, (result.stdout, result.stderr)
    assert "Warning" not in result.stderr
    return result.stdout


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
        assert process.wait(30) == 0
