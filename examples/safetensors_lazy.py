"""A weights file in the safetensors layout, from a URL: its tensors are numpy arrays, fetched when they are touched.

    python examples/safetensors_lazy.py                                          # makes a file and serves it
    python examples/safetensors_lazy.py https://host/model.safetensors [TENSOR]

The layout: eight bytes (little-endian) with the length of a JSON header, the header (name -> dtype, shape,
data_offsets), the data.
"""

import argparse
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
from page_server import serving

import aiouffd

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?", "BF16": "<u2",  # numpy has no bfloat16: these are its bits
}  # fmt: skip


def tensors(region: aiouffd.Region) -> dict[str, np.ndarray]:
    """Return each tensor of a file as a view of the region. Only the pages of the header are touched."""
    (length,) = struct.unpack("<Q", region[:8])
    header = json.loads(region[8 : 8 + length])
    header.pop("__metadata__", None)
    base = 8 + length
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        flat = np.frombuffer(region, np.uint8, end - start, base + start)
        found[name] = flat.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def make(path: Path, layers: int = 8, width: int = 1024) -> None:
    """Write a file whose layer n is filled with the number n."""
    shape = (width, width)
    size = width * width * 4
    header = {
        f"layers.{n}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [n * size, (n + 1) * size]}
        for n in range(layers)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for n in range(layers):
            file.write(np.full(shape, n, np.float32).tobytes())


def use(url: str, name: str) -> None:
    with aiouffd.open(url) as region:
        found = tensors(region)
        for each, tensor in found.items():
            print(f"{each:24} {tensor.dtype} {tensor.shape}")
        name = name or next(iter(found))
        print(f"the mean of {name} is {found[name].mean()}")
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
        make(Path(directory, "model.safetensors"))
        with serving(Path(directory)) as root:
            use(f"{root}/model.safetensors", "layers.5.weight")


if __name__ == "__main__":
    main()
