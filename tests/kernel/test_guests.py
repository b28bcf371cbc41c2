"""`aiouffd serve` and microVMs on /dev/kvm: the sum that a guest makes of its memory."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import gateway
import pytest
from pattern import PAGE
from scenario import eventually
from served import HUGE, MIB, VM, Serve, free_port, metric, on_the_web

from aiouffd.store import create_sync

if TYPE_CHECKING:
    from pathlib import Path


def total(pages: range, step: int = 1) -> int:
    """Return what the guest makes of these pages: it adds the first byte of each."""
    return sum((page + 1) & 255 for page in pages[::step]) & 0xFFFFFFFF


def run_vm(serve: Serve, *arguments: str) -> str:
    """Run a guest to its end; return what it said."""
    done = subprocess.run(
        [sys.executable, str(VM), str(serve.path), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is missing")


@needs_kvm
@pytest.mark.parametrize("readahead", ["0", "2M"])
def test_a_guest_sums_its_memory(image: Path, tmp_path: Path, readahead: str) -> None:
    """Every page right; a second machine beside the first; a balloon that gives back reads as zeros."""
    with Serve(tmp_path, image, "--readahead", readahead) as serve:
        right = total(range(16 * MIB // PAGE))
        assert f"checksum {right}," in run_vm(serve, "--memory", "16")
        machines = [
            subprocess.Popen(
                [sys.executable, str(VM), str(serve.path), "--memory", "16"], stdout=subprocess.PIPE, text=True
            )
            for _ in range(4)
        ]
        for machine in machines:
            output, _ = machine.communicate(timeout=60)
            assert f"checksum {right}," in output
        rest = total(range(4 * MIB // PAGE, 16 * MIB // PAGE))
        assert f"checksum {rest}," in run_vm(serve, "--memory", "16", "--balloon", "4", "--rounds", "2")
        eventually(lambda: serve.said.count("has ended"), 6)
        assert serve.end() == 0


@needs_kvm
@pytest.mark.usefixtures("huge_pages")
def test_a_guest_of_huge_pages(image: Path, tmp_path: Path) -> None:
    """Four pages of 2 MiB."""
    with Serve(tmp_path, image) as serve:
        right = total(range(8 * MIB // PAGE), HUGE // PAGE)
        assert f"checksum {right}, 4 pages" in run_vm(serve, "--memory", "8", "--page-size", str(HUGE))
        rest = total(range(HUGE // PAGE, 8 * MIB // PAGE), HUGE // PAGE)
        assert f"checksum {rest}, 4 pages" in run_vm(serve, "--memory", "8", "--page-size", str(HUGE), "--balloon", "2")


@needs_kvm
def test_a_guest_whose_memory_is_on_a_web_server(image: Path, tmp_path: Path) -> None:
    """From an HTTP source."""
    with on_the_web(image) as url, Serve(tmp_path, url) as serve:
        assert f"checksum {total(range(16 * MIB // PAGE))}," in run_vm(serve, "--memory", "16")


@pytest.mark.long
@needs_kvm
@pytest.mark.parametrize(("where", "size"), [("file", 16 * MIB), ("web", 4 * MIB)])
def test_a_guest_while_the_worker_is_killed(image: Path, tmp_path: Path, where: str, size: int) -> None:
    """Five kills that land while the guest still misses pages, one by one: its sum is right, and it is done."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(on_the_web(image)) if where == "web" else image
        port = free_port()
        serve = stack.enter_context(Serve(tmp_path, source, "--readahead", "0", "--metrics", port))
        command = [sys.executable, str(VM), str(serve.path), "--memory", str(size // MIB), "--rounds", "1"]
        landed = rounds = 0
        while landed < 5:
            rounds += 1
            assert rounds <= 40, f"only {landed} kills have landed"
            before = metric(port, 'aiouffd_pages_total{cause="fault"}')
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as machine:
                eventually(functools.partial(handoffs, serve), rounds)
                time.sleep(random.uniform(0.0, 0.03))  # somewhere in the guest's run
                os.kill(serve.worker, signal.SIGKILL)
                # A page that the killed worker was at is counted twice, at most; and the rest was still to come.
                if metric(port, 'aiouffd_pages_total{cause="fault"}') - before < size // PAGE - 1:
                    landed += 1
                assert machine.stdout is not None
                assert f"checksum {total(range(size // PAGE))}," in machine.stdout.read()
        assert metric(port, "aiouffd_worker_restarts_total") >= 5


def handoffs(serve: Serve) -> int:
    """Return how many were taken."""
    return serve.said.count("bytes in 1 region,")


@needs_kvm
def test_a_guest_whose_memory_is_in_layers_in_a_bucket(image: Path, tmp_path: Path) -> None:
    """Three compressed layers, a cache, and workers that are killed: a second guest needs nothing of the bucket."""
    data, right = image.read_bytes(), f"checksum {total(range(16 * MIB // PAGE))},"
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as bucket:
        url = bucket.enter_context(gateway.s3(tmp_path))
        above = None
        for number, end in enumerate((4 * MIB, 9 * MIB, len(data))):
            place, layer = f"s3://vol/vm/{number}.snap", data[:end] + bytes(len(data) - end)
            create_sync(layer, place, base=above, storage_options=gateway.options(url))
            above = place
        options = ("--cache", tmp_path / "cache", "--cache-size", "1G", "--readahead", "0")
        serve = stack.enter_context(Serve(tmp_path, above, *options, **gateway.environment(url)))  # type: ignore[arg-type]
        command = [sys.executable, str(VM), str(serve.path), "--memory", "16"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as machine:
            eventually(functools.partial(handoffs, serve), 1)
            for _ in range(2):
                time.sleep(random.uniform(0.0, 0.1))  # somewhere in the guest's run
                os.kill(serve.worker, signal.SIGKILL)
            assert machine.stdout is not None
            assert right in machine.stdout.read()
        bucket.close()
        os.kill(serve.worker, signal.SIGKILL)  # what it had in memory is gone as well
        assert right in run_vm(serve, "--memory", "16")
