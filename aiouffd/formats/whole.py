"""All arrays of a file at once: what needs them all waits for no touch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack

from aiouffd import native
from aiouffd.formats.safetensors import Safetensors
from aiouffd.monitor.engines.in_thread import InThread
from aiouffd.monitor.open import open as open_region

if TYPE_CHECKING:
    import os

    from typing_extensions import Buffer

    from aiouffd.formats.arrays import ArrayFile
    from aiouffd.monitor.monitor import ServingOptions
    from aiouffd.sources.base import Source
    from aiouffd.sources.storage_options import StorageOptions
    from aiouffd.store.cache import ChunkCache

__all__ = ["load_file"]


def load_file(
    what: str | os.PathLike[str] | Source | Buffer,
    *,
    kind: type[ArrayFile] = Safetensors,
    framework: Literal["torch", "numpy"] = "torch",
    storage_options: StorageOptions | None = None,
    cache: ChunkCache | None = None,
    **options: Unpack[ServingOptions],
) -> dict[str, Any]:
    """Return all arrays of a file by name, as `safetensors.torch.load_file` does, from wherever `aiouffd.open` reads.

    Nothing is written to a disk. When it returns all bytes are there, in plain memory, in huge pages where the kernel
    gives them (Linux 6.8): nobody serves it any more, and no touch waits. All arrays share it: it is freed with the
    last of them. What is written to them stays in this process.

    Where there is a native part, no process is started: the bytes are received by threads of this one.

    Blocks: in a program with a loop, `await asyncio.to_thread(load_file, what)`.

    Args:
        what: as for `aiouffd.open`.
        kind: the reader of its format.
        framework: whose arrays are wanted.
        storage_options: as for `aiouffd.open`.
        cache: as for `aiouffd.open`.
        **options: as for `Monitor`; `progress=True`, for example.

    Raises:
        FormatError: the file is not what the format demands; it names the file and the offset.
        SourceError: it is not there, empty, or bytes could not be had.
        TypeError: the framework has no such type; or an option is of memory that stays served: use `aiouffd.open`.
        UffdError: as for `Monitor`.
    """
    if framework not in ("torch", "numpy"):
        raise ValueError(f"framework must be 'torch' or 'numpy', not {framework!r}")
    if unfit := sorted({"max_resident", "write_back", "track_writes"} & {name for name in options if options[name]}):  # type: ignore[literal-required]
        raise TypeError(f"{', '.join(unfit)}: what this returns is served no longer, and all there: use aiouffd.open")
    engine = None if native.reason() else InThread()
    more = {"storage_options": storage_options, "cache": cache, **options}
    with open_region(what, engine=engine, on_exit="zeros", **more) as region:  # type: ignore[arg-type]
        coming = region.monitor.ask_for(0, len(region))
        file = kind(region)  # its header comes first
        coming.result()
        return {name: file.tensor(name) if framework == "torch" else file[name] for name in file}
