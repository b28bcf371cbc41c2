"""Checkpoint a simulation while it runs, kill it without warning, and go on from its last layer.

    python examples/checkpoint_simulation.py                          # all of that, and compares the end
    python examples/checkpoint_simulation.py LAYERS --steps 2000      # begins, or goes on where it was stopped

No step waits for a checkpoint. So the memory must make sense at any moment: there are two fields, and a number of steps
that says which of them is complete. Each layer has only what was written since the one before.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import aiouffd

SIDE = 512  # cells of a field's side, of 8 bytes: 2 MiB
HEADER = 4096
SIZE = HEADER + 2 * SIDE * SIDE * 8


def step(old: np.ndarray, new: np.ndarray) -> None:
    """Let heat flow between neighbors; the border keeps its own."""
    new[:] = old
    new[1:-1, 1:-1] = (old[:-2, 1:-1] + old[2:, 1:-1] + old[1:-1, :-2] + old[1:-1, 2:]) / 4


def simulate(region: aiouffd.Region, steps: int) -> None:
    """Simulate until so many steps are done; from the beginning, if none is."""
    done = np.frombuffer(region, np.int64, 1)
    fields = np.frombuffer(region, np.float64, offset=HEADER).reshape(2, SIDE, SIDE)
    if not done[0]:
        fields[:, 0] = 100.0
    while done[0] < steps:
        now = int(done[0])
        step(fields[now % 2], fields[(now + 1) % 2])
        done[0] = now + 1


def run(layers: str, steps: int) -> None:
    """Begin, or go on from the last layer; write layers meanwhile, and one at the end."""
    last = aiouffd.Checkpointer.last_of(layers)
    if last is None:
        region = aiouffd.Region(SIZE)
        monitor = aiouffd.Monitor(region)
        with monitor, aiouffd.Checkpointer(monitor, layers, every=0.1) as checkpointer:
            simulate(region, steps)
            checkpointer.take_sync()
        return
    with aiouffd.open(last) as region, aiouffd.Checkpointer(region.monitor, layers, every=0.1) as checkpointer:
        print(f"goes on from {Path(last).name}, behind step {int.from_bytes(region[:8], 'little')}")
        simulate(region, steps)
        checkpointer.take_sync()


def compare(layers: str, steps: int) -> None:
    """Say whether the last layer is what a run that nobody has stopped comes to."""
    with aiouffd.Region(SIZE) as region:
        simulate(region, steps)
        with aiouffd.open(aiouffd.Checkpointer.last_of(layers) or "") as found:
            right = region[:] == found[:]
    print(f"after {steps} steps the last layer is {'right' if right else 'WRONG'}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Checkpoint a simulation while it runs, and go on from a layer.")
    parser.add_argument("layers", nargs="?", help="folder of the checkpoints (default: kill a run, and go on from it)")
    parser.add_argument("--steps", type=int, default=1000, help="to simulate in all (%(default)s)")
    arguments = parser.parse_args()
    if arguments.layers:
        run(arguments.layers, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as layers:
        victim = subprocess.Popen([sys.executable, __file__, layers, "--steps", str(1 << 40)])
        while not list(Path(layers).glob("*2.snap")) and victim.poll() is None:
            os.sched_yield()
        victim.send_signal(signal.SIGKILL)
        print(f"killed: {victim.wait() == -signal.SIGKILL}")
        with aiouffd.open(aiouffd.Checkpointer.last_of(layers) or "") as region:
            steps = int.from_bytes(region[:8], "little") + 100
        run(layers, steps)
        compare(layers, steps)


if __name__ == "__main__":
    main()
