"""The files for operators under examples/: containers, Kubernetes, Prometheus and Grafana."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pattern import word
from scenario import eventually, play
from served import ROOT, Serve, free_port, hand_over, metric

from aiouffd.kernel.abi import SYS_USERFAULTFD

EXAMPLES = ROOT / "examples"
MIB = 1 << 20

CONTAINED = f"""
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(sys.argv[1].encode(), b"/dev/userfaultfd", None, 4096, None) == 0  # MS_BIND: nobody may open it
for capability in range(64):
    libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: the next execve leaves none
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
rules = [
    (0x20, 0, 0, 0),                  # the number of the system call
    (0x15, 0, 1, {SYS_USERFAULTFD}),  # userfaultfd(2)
    (0x06, 0, 0, 0x00050001),         # EPERM
    (0x06, 0, 0, 0x7FFF0000),         # all others are allowed
]
program = Program(len(rules), b"".join(struct.pack("=HBBI", *rule) for rule in rules))
assert libc.prctl(22, 2, ctypes.byref(program)) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP
os.execv(sys.executable, [sys.executable, "-m", "aiouffd", "serve", *sys.argv[2:]])
"""
"""Becomes `aiouffd serve` as in a container: process 1, no capability, no way to open a userfaultfd of its own."""


def in_the_namespace_of(pid: int) -> dict[int, int]:
    """Return the processes of a pid namespace by their number in it."""
    wanted = Path(f"/proc/{pid}/ns/pid").readlink()
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "ns/pid").readlink() == wanted:
                numbers = re.search(r"^NSpid:(.*)$", (entry / "status").read_text(), re.MULTILINE)
                found[int(numbers[1].split()[-1])] = int(entry.name)  # type: ignore[index]
        except OSError:  # it has just ended
            continue
    return found


def served_by_a_container(path: str, log: str, first: int) -> None:
    """Scenario: a microVM whose pager is in a container; the worker is killed, then the container is told to end."""
    region, connection, _uffd = hand_over(path, 16 * MIB)
    assert region[0] == 1
    keeper = int(Path(log).read_text().split("pager ", 1)[1].split('"', 1)[0])
    outside = in_the_namespace_of(first)[keeper]
    children = Path(f"/proc/{outside}/task/{outside}/children")
    eventually(lambda: bool(children.read_text().split()), expected=True)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    eventually(lambda: "is replaced" in Path(log).read_text(), expected=True)
    assert region[MIB : MIB + 8] == word(256)
    os.kill(first, signal.SIGTERM)
    connection.settimeout(10)
    assert connection.recv(1) == b""
    eventually(lambda: Path(f"/proc/{first}").exists(), expected=False)  # and with it all processes of the container
    assert bytes(region) == b"".join(word(page) * 512 for page in range(len(region) // 4096))


def test_a_container(image: Path, tmp_path: Path) -> None:
    """The pager needs no right and no device there; when it is told to end, its microVMs get all that they miss."""
    path, log = tmp_path / "uffd.sock", tmp_path / "log"
    closed = tmp_path / "closed"
    closed.touch(0)
    arguments = ["--on-term", "fill", "--socket", str(path)]
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", CONTAINED]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    with (
        log.open("w") as output,
        subprocess.Popen([*command, str(closed), str(image), *arguments], stderr=output, env=environment) as process,
    ):
        try:
            eventually(lambda: "listening" in log.read_text() or process.poll() is not None, expected=True)
            assert process.poll() is None, log.read_text()
            first = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
            status = Path(f"/proc/{first}/status").read_text()
            assert all(f"{name}\n" in status for name in ("CapEff:\t" + "0" * 16, "NoNewPrivs:\t1", "Seccomp:\t2"))
            play(served_by_a_container, str(path), str(log), first)
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()


def test_the_manifest_of_kubernetes() -> None:
    """It is what Kubernetes takes, without a privilege, and its command line is what `aiouffd serve` understands."""
    (manifest,) = yaml.safe_load_all((EXAMPLES / "kubernetes/aiouffd.yaml").read_text())
    kubernetes_validate.validate(manifest, "1.37", strict=True)
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not any("privileged" in each["securityContext"] for each in (*pod["initContainers"], container))
    entry = re.search(r"^ENTRYPOINT (.*)$", (EXAMPLES / "container/Dockerfile").read_text(), re.MULTILINE)
    assert entry is not None
    arguments = [*json.loads(entry[1])[1:], *container["args"]]
    asked = {flag.partition("=")[0] for flag in arguments[1:] if flag.startswith("--")}
    told = subprocess.run(
        [sys.executable, "-m", "aiouffd", "serve", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert all(flag in told.stdout for flag in asked)


def queries() -> list[str]:
    """Return the expressions of all rules and panels, as Prometheus takes them."""
    (group,) = yaml.safe_load((EXAMPLES / "prometheus/alerts.yml").read_text())["groups"]
    board = json.loads((EXAMPLES / "grafana/dashboard.json").read_text())
    found = [rule["expr"] for rule in group["rules"]]
    found += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [text.replace("$__rate_interval", "5s").replace("$instance", ".*") for text in found]


def ask(port: int, query: str) -> list[Any]:
    """Return what Prometheus finds."""
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(url, timeout=60) as answer:
        found: list[Any] = json.load(answer)["data"]["result"]
    return found


def touches(path: str) -> None:
    """Scenario: a client touches some pages."""
    region, _connection, _uffd = hand_over(path, MIB)
    assert all(region[page * 4096] == page + 1 & 255 for page in range(64))


needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")


@needs_prometheus
def test_rules_fire_when_they_should() -> None:
    """The unit tests of the alert rules, run by Prometheus' own tool."""
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command],
            cwd=EXAMPLES / "prometheus", capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_what_prometheus_sees(image: Path, tmp_path: Path) -> None:
    """Each expression of the rules and of the dashboard is understood, and speaks of metrics that are there."""
    ports = free_port(), free_port()
    text = (EXAMPLES / "prometheus/prometheus.yml").read_text().replace("15s", "1s").replace("9177", str(ports[0]))
    (tmp_path / "prometheus.yml").write_text(text)
    shutil.copy(EXAMPLES / "prometheus/alerts.yml", tmp_path)
    command = [
        "prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--web.listen-address=127.0.0.1:{ports[1]}",
        f"--storage.tsdb.path={tmp_path}/data", "--log.level=warn",
    ]  # fmt: skip
    with (
        Serve(tmp_path, image, "--readahead", "0", "--metrics", ports[0]) as serve,
        subprocess.Popen(command, stdin=subprocess.DEVNULL) as process,
    ):
        try:

            def scraped() -> int:
                try:
                    return len(ask(ports[1], 'aiouffd_clients{job="aiouffd"}'))
                except OSError:  # it does not listen yet
                    return 0

            eventually(scraped, 1)
            play(touches, str(serve.path))
            assert metric(ports[0], "aiouffd_faults_total") == 64
            eventually(lambda: bool(ask(ports[1], "aiouffd_faults_total == 64")), expected=True)
            for query in queries():
                assert isinstance(ask(ports[1], query), list)
                for name in re.findall(r"aiouffd_\w+", query):
                    assert ask(ports[1], name), f"{name}: there is no such metric"
        finally:
            process.terminate()
