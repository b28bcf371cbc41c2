"""Train a small network in memory that is checkpointed meanwhile, kill it without warning, and go on from a layer.

    pip install torch
    python examples/checkpoint_training.py                          # all of that, and compares the end
    python examples/checkpoint_training.py LAYERS --steps 2000      # begins, or goes on where it was stopped

No step waits for a checkpoint, and no tensor is copied for one. As in checkpoint_simulation.py there are two sets of
parameters, and a number of steps that says which of them is complete.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiouffd

SHAPES = ((64, 256), (256,), (256, 64), (64,))  # of the network's parameters
COUNT = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in SHAPES)
HEADER = 4096
SIZE = HEADER + 2 * 2 * COUNT * 4  # two sets of parameters and momenta, of 4 bytes


def train(region: aiouffd.Region, steps: int) -> None:
    """Train until so many steps are done: SGD with momentum, each batch made from the number of its step."""
    import torch  # noqa: PLC0415 - `--help` needs none

    done = torch.frombuffer(region, dtype=torch.int64, count=1)
    sets = torch.frombuffer(region, dtype=torch.float32, offset=HEADER).view(2, 2, COUNT)
    if not done[0]:
        sets[0, 0] = 0.05 * torch.randn(COUNT, generator=torch.Generator().manual_seed(1))
    while (now := int(done[0])) < steps:
        (old, momentum), (new, new_momentum) = sets[now % 2], sets[(now + 1) % 2]
        flat = old.detach().clone().requires_grad_(True)
        pieces = torch.split(flat, [torch.Size(shape).numel() for shape in SHAPES])
        first, bias, second, last = (piece.view(shape) for piece, shape in zip(pieces, SHAPES, strict=True))
        batch = torch.randn(32, 64, generator=torch.Generator().manual_seed(now))
        loss: Any = ((torch.relu(batch @ first + bias) @ second + last - batch.flip(1)) ** 2).mean()
        (gradient,) = torch.autograd.grad(loss, flat)
        torch.add(gradient, momentum, alpha=0.9, out=new_momentum)
        torch.sub(old, new_momentum, alpha=0.05, out=new)
        done[0] = now + 1


def run(layers: str, steps: int) -> None:
    """Begin, or go on from the last layer; write layers meanwhile, and one at the end."""
    import torch  # noqa: F401, PLC0415 - before the first layer: it takes seconds

    last = aiouffd.Checkpointer.last_of(layers)
    if last is None:
        monitor = aiouffd.Monitor(aiouffd.Region(SIZE))
        with monitor as entered, aiouffd.Checkpointer(entered, layers, every=0.1) as checkpointer:
            train(entered.region, steps)
            checkpointer.take_sync()
        return
    with aiouffd.open(last) as region, aiouffd.Checkpointer(region.monitor, layers, every=0.1) as checkpointer:
        print(f"goes on from {Path(last).name}, behind step {int.from_bytes(region[:8], 'little')}")
        train(region, steps)
        checkpointer.take_sync()


def main() -> None:
    parser = argparse.ArgumentParser(description="Checkpoint the training of a network, and go on from a layer.")
    parser.add_argument("layers", nargs="?", help="folder of the checkpoints (default: kill a run, and go on from it)")
    parser.add_argument("--steps", type=int, default=1000, help="to train in all (%(default)s)")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is not installed: pip install torch")
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
        with aiouffd.Region(SIZE) as region, aiouffd.open(aiouffd.Checkpointer.last_of(layers) or "") as found:
            train(region, steps)
            right = region[:] == found[:]
        print(f"after {steps} steps the last layer is {'right' if right else 'WRONG'}")


if __name__ == "__main__":
    main()
