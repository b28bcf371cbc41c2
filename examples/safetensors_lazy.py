"""A weights file in the safetensors layout, from a URL: its tensors are numpy arrays, fetched when they are touched.

    python examples/safetensors_lazy.py                                          # makes a file and serves it
    python examples/safetensors_lazy.py https://host/model.safetensors [TENSOR]

`aiouffd.formats` knows the layout; for GGUF, .npy, .npz and files of torch.save it has classes as well.
"""

import argparse
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
from page_server import serving

import aiouffd
from aiouffd import formats


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file of float32: the length of a JSON header (u64), the header, the data."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.astype(np.float32).tobytes())


def use(url: str, name: str) -> None:
    with aiouffd.open(url) as region:
        file = formats.Safetensors(region)  # touches the header only
        for each, tensor in file.items():
            print(f"{each:24} {tensor.dtype} {tensor.shape}")
        name = name or next(iter(file))
        file.prefetch_tensor_sync(name)  # its bytes and no others; a touch brings its surroundings, too
        print(f"the mean of {name} is {file[name].mean()}")
        seen = region.monitor.statistics()
        print(f"{seen.bytes_fetched:,} of {len(region):,} bytes fetched, in {seen.faults} faults")


def main() -> None:
    parser = argparse.ArgumentParser(description="Use the tensors of a safetensors file on a web server.")
    parser.add_argument("url", nargs="?", help="default: a file of 32 MiB that this program makes and serves")
    parser.add_argument("tensor", nargs="?", default="", help="name of the tensor to read (default: the first)")
    arguments = parser.parse_args()
    if arguments.url:
        use(arguments.url, arguments.tensor)
        return
    with tempfile.TemporaryDirectory() as directory:
        tensors = {f"layers.{n}.weight": np.full((1024, 1024), n, np.float32) for n in range(8)}
        write(Path(directory, "model.safetensors"), tensors)
        with serving(Path(directory)) as root:
            use(f"{root}/model.safetensors", "layers.5.weight")


if __name__ == "__main__":
    main()
