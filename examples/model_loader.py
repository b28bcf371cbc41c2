"""Load a sharded model as vLLM and transformers do, one worker of several: each fetches its part of each tensor.

    python examples/model_loader.py                                   # makes a model and serves it
    python examples/model_loader.py https://host/model --rank 1 --workers 4

A directory has model.safetensors.index.json, which says what file each tensor is in. `weights` yields (name, tensor),
as the weight iterators of model loaders do; while the model takes one tensor, the next ones are on their way. Tensors
are torch's where it is installed, else numpy's, and lie on the regions: nothing is copied.
"""

import argparse
import importlib.util
import json
import tempfile
import urllib.request
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from page_server import serving
from safetensors_lazy import write

import aiouffd
from aiouffd import formats

INDEX = "model.safetensors.index.json"
AHEAD = 8  # tensors that are on their way while one is used


class Loader:
    """The tensors of a sharded model.

    Args:
        url: of the directory.
        rank: which of the workers this is. A matrix is cut along its first axis; all else each worker has for itself.
        workers: how many there are.
    """

    def __init__(self, url: str, rank: int = 0, workers: int = 1) -> None:
        with urllib.request.urlopen(f"{url}/{INDEX}") as answer:  # noqa: S310 - an example
            self.files: dict[str, str] = json.load(answer)["weight_map"]
        self.shards = {
            name: formats.Safetensors(aiouffd.map(f"{url}/{name}")) for name in sorted(set(self.files.values()))
        }
        self.rank, self.workers = rank, workers

    def part(self, name: str) -> Any:
        """Return this worker's part of a tensor, none of which is touched."""
        shard = self.shards[self.files[name]]
        tensor = shard.tensor(name) if importlib.util.find_spec("torch") else shard[name]
        if tensor.ndim < 2:
            return tensor
        rows = tensor.shape[0] // self.workers
        return tensor[self.rank * rows : (self.rank + 1) * rows]

    def weights(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, tensor), in the order of the index; the next ones are on their way."""
        coming: deque[tuple[str, Any, Any]] = deque()
        for name in self.files:
            part = self.part(name)
            coming.append((name, part, self.shards[self.files[name]].ask_for_tensor(part)))
            if len(coming) > AHEAD:
                yield self.come(*coming.popleft())
        while coming:
            yield self.come(*coming.popleft())

    @staticmethod
    def come(name: str, part: Any, coming: Any) -> tuple[str, Any]:
        """Return a tensor that is all there."""
        coming.result()
        return name, part

    def fetched(self) -> tuple[int, int]:
        """Return how many bytes were fetched, and of how many."""
        regions = [shard.region for shard in self.shards.values()]
        return sum(region.monitor.statistics().bytes_fetched for region in regions), sum(map(len, regions))


class Model:
    """What a framework would have: here it adds up what it gets."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def load_weights(self, weights: Iterator[tuple[str, Any]]) -> None:
        for name, tensor in weights:
            self.sums[name] = float(tensor.sum())


def make(directory: Path, layers: int = 8, width: int = 1024) -> None:
    """Write a model of two files; row r of the matrix of layer n is filled with n + r / width."""
    files = {}
    for number in range(2):
        tensors = {}
        for layer in range(number, layers, 2):
            tensors[f"layers.{layer}.bias"] = bias = layer + np.arange(width, dtype=np.float32) / width
            tensors[f"layers.{layer}.weight"] = np.repeat(bias, width).reshape(width, width)
        file = f"model-{number + 1:05}-of-00002.safetensors"
        write(directory / file, tensors)
        files |= dict.fromkeys(tensors, file)
    order = sorted(files, key=lambda name: int(name.split(".")[1]))
    (directory / INDEX).write_text(json.dumps({"weight_map": {name: files[name] for name in order}}))


def use(url: str, rank: int, workers: int) -> None:
    loader, model = Loader(url, rank, workers), Model()
    model.load_weights(loader.weights())
    for name, value in model.sums.items():
        print(f"{name:20} sum of this worker's part: {value:.1f}")
    fetched, size = loader.fetched()
    print(f"worker {rank} of {workers}: {fetched:,} of {size:,} bytes fetched")


def main() -> None:
    parser = argparse.ArgumentParser(description="Load one worker's part of a sharded safetensors model.")
    parser.add_argument("url", nargs="?", help=f"directory with {INDEX}; default: one that this program makes")
    parser.add_argument("--rank", type=int, default=1, help="which worker this is (%(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="how many workers there are (%(default)s)")
    arguments = parser.parse_args()
    if arguments.url:
        use(arguments.url, arguments.rank, arguments.workers)
        return
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory))
        with serving(Path(directory)) as root:
            use(root, arguments.rank, arguments.workers)


if __name__ == "__main__":
    main()
