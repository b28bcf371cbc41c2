"""`server.metrics`: what Prometheus reads."""

from __future__ import annotations

import os
import signal
import urllib.request
from typing import TYPE_CHECKING

from scenario import eventually, play
from served import MIB, Serve, client, free_port

if TYPE_CHECKING:
    from pathlib import Path


def test_metrics(image: Path, tmp_path: Path) -> None:
    """What Prometheus reads is what happened."""
    port = free_port()
    with Serve(tmp_path, image, "--readahead", "0", "--metrics", port) as serve:
        play(client, str(serve.path), MIB)
        os.kill(serve.worker, signal.SIGKILL)
        eventually(lambda: "is replaced" in serve.said, expected=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
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
        wanted |= {"aiouffd_source_retries_total", "aiouffd_source_errors_total", "aiouffd_fault_latency_seconds_sum"}
        assert wanted <= set(found)
        assert found['aiouffd_fault_latency_seconds_bucket{le="+Inf"}'] == found["aiouffd_fault_latency_seconds_count"]
