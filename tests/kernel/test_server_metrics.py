"""`server.metrics`: what Prometheus reads."""

from __future__ import annotations

import os
import signal
import urllib.request
from pathlib import Path

from pattern import PAGE
from scenario import eventually, play
from served import MIB, Serve, client, free_port, hand_over, metric


def test_metrics(image: Path, tmp_path: Path) -> None:
    """What Prometheus reads is what happened."""
    port = free_port()
    with Serve(tmp_path, image, "--readahead", "0", "--metrics", port) as serve:
        play(client, str(serve.path), MIB)
        os.kill(serve.worker, signal.SIGKILL)
        eventually(lambda: "is replaced" in serve.said, expected=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
        assert found['aiouffd_pages_total{cause="prefetch"}'] == 256
        assert found['aiouffd_events_total{event="remove"}'] == 1
        assert found["aiouffd_worker_restarts_total"] == 1
        assert found["aiouffd_clients"] == 0
        assert found["aiouffd_faults_total"] >= 16
        assert found["aiouffd_fetched_bytes_total"] >= MIB
        causes = ("fault", "readahead", "prefetch", "replay", "background")
        wanted = {f'aiouffd_pages_total{{cause="{cause}"}}' for cause in causes}
        wanted |= {
            f'aiouffd_answers_total{{answer="{answer}"}}' for answer in ("eagain", "eexist", "enoent", "partial")
        }
        wanted |= {"aiouffd_in_flight", "aiouffd_in_flight_bytes", "aiouffd_rejected_clients_total"}
        wanted |= {"aiouffd_source_reads_total", "aiouffd_source_seconds_total", "aiouffd_sequential_faults_total"}
        wanted |= {"aiouffd_source_retries_total", "aiouffd_source_errors_total", "aiouffd_fault_latency_seconds_sum"}
        assert wanted <= set(found)
        assert found['aiouffd_fault_latency_seconds_bucket{le="+Inf"}'] == found["aiouffd_fault_latency_seconds_count"]


def kept(path: str, pid: int, log: str, image: str, directory: str, port: int) -> None:
    """Scenario: a client is served on while its server is replaced by a new one, of the same socket and metrics."""
    region, _connection, _uffd = hand_over(path)
    assert region[0] == 1
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: "no new clients" in Path(log).read_text(), expected=True)
    os.mkdir(directory)  # noqa: PTH102 - a literal came along
    with Serve(Path(directory), image, "--metrics", port, socket=path):
        play(client, path, MIB)
        assert metric(port, "aiouffd_faults_total") > 0
        assert region[9 * PAGE] == 10


def test_an_upgrade(image: Path, tmp_path: Path) -> None:
    """A new server takes over socket and metrics, while the old one waits for its clients to leave."""
    port = free_port()
    with Serve(tmp_path, image, "--metrics", port) as serve:
        arguments = (serve.process.pid, str(serve.log), str(image), str(tmp_path / "new"), port)
        play(kept, str(serve.path), *arguments, deadline=60)
        assert serve.process.wait(60) == 0
