"""The command line, the examples and the README, as a user runs them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scenario import ended
from web import serving

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"


def run(*command: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command with a deadline."""
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == status, (result.stdout, result.stderr)
    return result


def aiouffd(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return run(
        sys.executable, "-c", "import sys; from aiouffd.cli import main; sys.exit(main())", *arguments, status=status
    )


def test_the_demo_checks_every_byte() -> None:
    """64 MiB: exit status 0, and what came is printed: touched, fetched, faults, latency, a map."""
    output = aiouffd("demo", "--size", "64M", "--touches", "500").stdout
    for words in ("touched", "fetched", "page faults", "p50", "p99", "Every touched byte is right"):
        assert words in output
    assert re.search(r"\|[ .:+#]{20,}\|", output)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
def test_nothing_is_left_of_a_demo_that_is_ended(number: signal.Signals, status: int, tmp_path: Path) -> None:
    """The HTTP server and both processes of the pager end; its input file, too, unless it is killed.

    The signal comes as from a terminal, to all of the process group, while threads touch.
    """
    command = [
        sys.executable,
        "-c",
        "import sys; from aiouffd.cli import main; sys.exit(main())",
        "demo",
        "--size",
        "64M",
        "--touches",
        "16000",
    ]
    command += ["--latency-ms", "5", "--threads", "2"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, env=environment)
    try:
        family: set[int] = set()
        end = time.monotonic() + 30
        while len(family) < 3 and time.monotonic() < end:
            family = descendants(process.pid)
            time.sleep(0.01)
        assert len(family) == 3
    finally:
        os.killpg(process.pid, number)
        assert process.wait(20) == status
    assert all(ended(pid, 2.0) for pid in family)
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())


def descendants(pid: int) -> set[int]:
    """Return the processes below one."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | (descendants(child) if Path(f"/proc/{child}").exists() else set())
    return found


def test_doctor() -> None:
    """Every feature with its Linux release, and the verdict."""
    output = aiouffd("doctor").stdout
    for words in ("EVENT_FORK", "4.11", "MOVE", "6.8", "syscall", "user-mode-only", "KVM", "The main job can run"):
        assert words in output


def test_doctor_as_nobody() -> None:
    """Exit status 1, and what to change."""
    if os.geteuid():
        pytest.skip("needs root, to drop it")
    code = "import os; from aiouffd.cli.doctor import examine; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    code += "report = examine(); print('\\n'.join(report.lines())); raise SystemExit(not report.ok)"
    output = run(sys.executable, "-c", code, status=1).stdout
    assert "vm.unprivileged_userfaultfd=1" in output
    assert "The main job cannot run" in output


@pytest.mark.parametrize("arguments", [("demo", "--size", "many"), ("nonsense",), ("demo", "--threads", "0")])
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    """And a sentence, no traceback."""
    result = aiouffd(*arguments, status=2)
    assert "Traceback" not in result.stderr
    assert result.stderr


def test_version() -> None:
    """It is the package's."""
    import aiouffd as package

    assert package.__version__ in aiouffd("--version").stdout


@pytest.fixture
def url(tmp_path: Path) -> object:
    """The page server of the examples, with a weights file made by the example."""
    run(sys.executable, EXAMPLES / "safetensors_lazy.py", "--make", tmp_path / "model.safetensors")
    with serving(tmp_path) as url:
        yield f"{url}/model.safetensors"


def test_example_lazy_array(url: str) -> None:
    """It touches a little and fetches not much more."""
    output = run(sys.executable, EXAMPLES / "lazy_array.py", url).stdout
    assert "sum of the last 100,000: 7200000" in output  # layer 7: 00 00 e0 40, 25,000 times


def test_example_safetensors(url: str) -> None:
    """A tensor of the middle is right, and most of the file was not fetched."""
    output = run(sys.executable, EXAMPLES / "safetensors_lazy.py", url, "layers.5.weight").stdout
    assert "mean of layers.5.weight: 5.0" in output
    fetched, size = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) of ([\d,]+) bytes", output)[0])
    assert fetched < size / 3


def test_example_custom_handler() -> None:
    """Squares, computed where they are looked at."""
    result = run(sys.executable, EXAMPLES / "custom_handler.py")
    assert f"1234567 squared is {1234567**2}" in result.stdout


# The README


def readme_command(name: str) -> str:
    """Return the command that stands behind its marker."""
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_readme_commands_do_all_the_setup() -> None:
    """Each makes an environment and installs the extra that it runs; CI takes them from there."""
    for name, program in (("demo", "aiouffd demo"), ("tests", "pytest")):
        command = readme_command(name)
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
        assert command.endswith(program)
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
