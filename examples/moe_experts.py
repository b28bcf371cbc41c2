"""Run a mixture of experts whose weights are on a server: an expert is fetched when the router first chooses it.

    python examples/moe_experts.py [--tokens N]
    python examples/moe_experts.py https://host/model.safetensors

In each layer the router chooses two of sixteen experts for a token. While a layer computes, the experts that the next
one will probably need are prefetched. The model is small and random, and laid out as real ones are: a safetensors file
with `layers.L.router` and `layers.L.experts.E.weight`.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np
from page_server import serving
from safetensors_lazy import write

import aiouffd
from aiouffd import formats

LAYERS, EXPERTS, CHOSEN, WIDTH = 4, 16, 2, 256


def make(path: Path) -> None:
    """Write a model of 16 MiB."""
    random = np.random.default_rng(0)
    shapes = {f"layers.{layer}.router": (WIDTH, EXPERTS) for layer in range(LAYERS)}
    shapes |= {f"layers.{n}.experts.{e}.weight": (WIDTH, WIDTH) for n in range(LAYERS) for e in range(EXPERTS)}
    tensors = {name: random.standard_normal(shape, np.float32) / shape[0] ** 0.5 for name, shape in shapes.items()}
    write(path, tensors)


class Model:
    """The tensors of a mapped file, and what has been asked for."""

    def __init__(self, region: aiouffd.Region) -> None:
        self.file = formats.Safetensors(region)
        self.asked: set[str] = set()

    async def bring(self, name: str) -> np.ndarray:
        """Return a tensor that is present."""
        self.asked.add(name)
        await self.file.prefetch_tensor(name)
        return self.file[name]

    async def run(self, token: np.ndarray) -> np.ndarray:
        """Send a token through all layers."""
        for layer in range(LAYERS):
            chosen = await self.route(layer, token)
            # A token changes little from layer to layer: the next layer's router can be asked about it already.
            ahead = [] if layer + 1 == LAYERS else await self.route(layer + 1, token)
            coming = [asyncio.create_task(self.bring(f"layers.{layer + 1}.experts.{one}.weight")) for one in ahead]
            experts = await asyncio.gather(*(self.bring(f"layers.{layer}.experts.{one}.weight") for one in chosen))
            token = token + sum(np.tanh(token @ expert) for expert in experts) / CHOSEN
            await asyncio.gather(*coming)
        return token

    async def route(self, layer: int, token: np.ndarray) -> list[int]:
        """Return the experts that a layer's router chooses for a token."""
        scores = token @ await self.bring(f"layers.{layer}.router")
        return np.argsort(scores)[-CHOSEN:].tolist()


async def use(url: str, count: int) -> None:
    began = time.perf_counter()
    async with aiouffd.open(url, readahead=0) as region:
        model = await asyncio.to_thread(Model, region)  # it touches the header
        for number, token in enumerate(np.random.default_rng(1).standard_normal((count, WIDTH), np.float32)):
            result = await model.run(token)
            experts = sum(".experts." in name for name in model.asked)
            print(f"token {number}: {experts:2} of {LAYERS * EXPERTS} experts, {time.perf_counter() - began:.3f} s")
        seen = region.monitor.statistics()
        print(f"the last result is {np.linalg.norm(result):.6f}")
        print(f"{seen.bytes_fetched:,} of {len(region):,} bytes fetched")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a mixture of experts whose weights come on demand.")
    parser.add_argument("url", nargs="?", help="of a model as this program makes them (default: it makes one)")
    parser.add_argument("--tokens", type=int, default=3, help="to send through it (%(default)s)")
    arguments = parser.parse_args()
    if arguments.url:
        asyncio.run(use(arguments.url, arguments.tokens))
        return
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory, "model.safetensors"))
        with serving(Path(directory)) as root:
            asyncio.run(use(f"{root}/model.safetensors", arguments.tokens))


if __name__ == "__main__":
    main()
