"""Files of arrays, on a region: each array by its name, without a copy, and what is asked for is brought beforehand.

    with aiouffd.open("https://host/model.safetensors") as region:
        model = formats.Safetensors(region)
        model.prefetch_tensor_sync("layers.5.weight")  # these bytes and no others
        model["layers.5.weight"]                       # a numpy array; model.tensor(...) is torch's

Layout, the lowest first: `dtypes` (the element types), `header` (reads what a file says of itself, and checks it),
`spans` (the bytes that an array has), `arrays` (what all readers share), then the readers: `npy`, `safetensors`,
`gguf`, `stored_zip` (members of a zip file that are not compressed), `npz`, `checkpoint` (what `torch.save` writes).
Above them `whole`: all arrays of a file at once.

Files are not trusted: each length and offset is checked before it is used, and no code of a file runs. What is wrong is
a `FormatError`, which names the file and the place. numpy and torch are imported where they are used.
"""

from aiouffd.formats.arrays import ArrayEntry, ArrayFile
from aiouffd.formats.checkpoint import Checkpoint
from aiouffd.formats.gguf import Gguf
from aiouffd.formats.npy import Npy
from aiouffd.formats.npz import Npz
from aiouffd.formats.safetensors import Safetensors
from aiouffd.formats.whole import load_file

__all__ = ["ArrayEntry", "ArrayFile", "Checkpoint", "Gguf", "Npy", "Npz", "Safetensors", "load_file"]
