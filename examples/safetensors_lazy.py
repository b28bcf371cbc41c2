"""A weights file in the safetensors layout, from a URL: tensors are numpy arrays, bytes come when they are touched.

    python examples/safetensors_lazy.py https://host/model.safetensors [TENSOR]
    python examples/safetensors_lazy.py --make /data/model.safetensors      # makes a file to try it with

The layout: eight bytes (little-endian) with the length of a JSON header, the header (name -> dtype, shape,
data_offsets), the data.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

import aiouffd

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?", "BF16": "<u2",  # numpy has no bfloat16: its bits
}  # fmt: skip


def tensors(region: aiouffd.Region) -> dict[str, np.ndarray]:
    """Return every tensor of a file as a view into the region. Only the header's pages are touched."""
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


def main(arguments: list[str]) -> None:
    if arguments[0] == "--make":
        make(Path(arguments[1]))
        return
    with aiouffd.open(arguments[0]) as region:
        found = tensors(region)
        for name, tensor in found.items():
            print(f"{name:24} {tensor.dtype} {tensor.shape}")
        name = arguments[1] if len(arguments) > 1 else next(iter(found))
        print(f"mean of {name}: {found[name].mean()}")
        seen = region.monitor.statistics()
        print(f"{seen.bytes_fetched:,} of {len(region):,} bytes fetched, in {seen.faults} faults")
        del found  # views keep the region mapped; what has come stays readable after the block


if __name__ == "__main__":
    main(sys.argv[1:])
