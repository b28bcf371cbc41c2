"""`aiouffd snapshot`: write, look at, check and copy snapshots."""

from __future__ import annotations

import contextlib
import datetime as dt
from typing import TYPE_CHECKING, Any

import click
import rich.progress
from rich.console import Console

from aiouffd import store
from aiouffd.cli import parameters
from aiouffd.report.words import several
from aiouffd.store.codecs import CODECS, LEVEL
from aiouffd.store.collect import GRACE
from aiouffd.store.manifest import checked_chunk_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.store.aside import Progress

__all__ = ["command"]


class _ChunkSize(parameters.Size):
    """A power of two."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        size = super().convert(value, param, ctx)
        try:
            return checked_chunk_size(size)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_codec = click.option("--codec", type=click.Choice(list(CODECS)), help="How chunks are compressed.")
_level = click.option("--level", type=click.IntRange(1, 22), default=LEVEL, show_default=True, help="Of zstd.")
_chunk = click.option(
    "--chunk",
    "chunk_size",
    type=_ChunkSize(),
    help="Bytes of the image in a chunk, a power of two from 64K to 8M. [default: of the base, or 64K]",
)
_replace = click.option("--replace", is_flag=True, help="Replace a snapshot of that name.")


@click.group("snapshot")
def command() -> None:
    """Write, look at, check and copy snapshots: compressed images in layers.

    A snapshot is named by its manifest, a path or a URL (http, s3, gs, az) that ends with .snap.
    """


@contextlib.contextmanager
def _progress(doing: str, *, is_bytes: bool = True) -> Iterator[Progress]:
    """Show how far something is, on standard error, where that is a terminal."""
    columns: list[rich.progress.ProgressColumn] = [
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        *((rich.progress.DownloadColumn(binary_units=True), rich.progress.TransferSpeedColumn()) if is_bytes else ()),
        rich.progress.TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(doing, total=None)
        yield lambda done, whole: shown.update(task, completed=done, total=whole)


def _size(count: int) -> str:
    return f"{count:,} bytes"


@command.command()
@click.argument("source")
@click.argument("destination")
@click.option("--base", help="A snapshot in the same store: chunks that it has are not written.")
@click.option(
    "--diff", is_flag=True, help="SOURCE has what has changed since the base, and holes elsewhere (Firecracker)."
)
@_codec
@_level
@_chunk
@click.option("--page-size", type=parameters.Size(4096), default="4K", help="Of the memory that it is an image of.")
@click.option("--trace", type=click.Path(), help="Keep this recording of first touches with it.")
@_replace
def create(source: str, destination: str, *, codec: str | None, **options: Any) -> None:
    """Write the snapshot DESTINATION of SOURCE: a file, a URL, or another snapshot.

    \b
    aiouffd snapshot create vm.mem snapshots/first.snap
    aiouffd snapshot create vm.mem snapshots/second.snap --base snapshots/first.snap
    aiouffd snapshot create diff.mem snapshots/third.snap --base snapshots/second.snap --diff
    """  # noqa: D301 - a backspace is click's mark for lines that are kept
    with _progress(f"writing {destination}") as progress:
        store.create_sync(source, destination, codec=codec or "zstd", progress=progress, **options)


@command.command()
@click.argument("place")
@click.argument("trace", type=click.Path(exists=True, dir_okay=False))
@parameters.merged_by(
    "How it is merged with the recording that PLACE has: as by `aiouffd trace merge`; or in its place."
)
@click.option("--limit", type=parameters.Size(4096), help="The most bytes of pages. [default: no limit]")
def attach(place: str, trace: str, *, by: Any, limit: int | None) -> None:
    """Keep the recording TRACE with the snapshot PLACE: its pages are brought when PLACE is opened from now on.

    \b
    aiouffd ctl record vm1 vm1.trace
    aiouffd ctl record vm1 --stop
    aiouffd snapshot attach snapshots/first.snap vm1.trace
    """  # noqa: D301 - as above
    manifest = store.attach_sync(place, trace, by=None if by == "replace" else by, most=limit)
    assert manifest.trace is not None
    click.echo(f"{place}: has a recording of {_size(manifest.trace.length)}")


@command.command()
@click.argument("place")
def info(place: str) -> None:
    """Print what the snapshot PLACE is: its size, what of it is stored, and where."""
    snapshot = store.open_snapshot(place)
    manifest, index = snapshot.manifest, snapshot.index
    codecs = dict.fromkeys(CODECS, 0)
    names = {number: name for name, number in CODECS.items()}
    stored = 0
    for record in index.find_all():
        codecs[names[record.codec]] += 1
        stored += record.length
    packs = [index.pack(number) for number in range(index.packs)]
    rows = {
        "image": _size(manifest.size),
        "pages": _size(manifest.page_size),
        "chunks": f"{index.chunks:,} of {_size(index.chunk_size)}; {index.chunks - index.records:,} are zeros",
        "codecs": ", ".join(f"{name}: {count:,}" for name, count in codecs.items() if count) or "none",
        "stored": f"{_size(stored)}, in {several(len(packs), 'pack')} of {_size(sum(pack.length for pack in packs))}",
        "index": f"{_size(manifest.index.length)}, {manifest.index.hash}",
        "base": manifest.base or "none",
        "recording": "none" if manifest.trace is None else _size(manifest.trace.length),
        "metadata": str(manifest.metadata or "none"),
    }
    for name, value in rows.items():
        click.echo(f"{name:<10} {value}")


@command.command()
@click.argument("place")
def verify(place: str) -> int:
    """Read all of the snapshot PLACE, and compare each chunk with its hash. Exit status 1 if anything is damaged."""
    with _progress(f"reading {place}") as progress:
        found = store.verify_sync(place, progress=progress)
    for error in found:
        click.echo(str(error), err=True)
    click.echo(f"{place}: {len(found)} objects or chunks are damaged or missing" if found else f"{place}: all is well")
    return 1 if found else 0


@command.command()
@click.argument("place")
@click.argument("file", type=click.Path())
def extract(place: str, file: str) -> None:
    """Write the image of the snapshot PLACE to FILE. Zeros become holes."""
    with _progress(f"writing {file}") as progress:
        store.extract_sync(place, file, progress=progress)


@command.command()
@click.argument("source")
@click.argument("destination")
@_codec
@_level
@_chunk
@_replace
def flatten(source: str, destination: str, **options: Any) -> None:
    """Write SOURCE anew as DESTINATION, into packs that hold nothing else."""
    with _progress(f"writing {destination}") as progress:
        store.flatten_sync(source, destination, progress=progress, **options)


@command.command()
@click.argument("one")
@click.argument("other")
def diff(one: str, other: str) -> int:
    """Print where the images of ONE and OTHER differ, as offset and length. Exit status 1 if they do."""
    with _progress("comparing") as progress:
        found = store.diff_sync(one, other, progress=progress)
    for piece in found:
        click.echo(f"{piece.start} {piece.length}")
    return 1 if found else 0


@command.command()
@click.argument("source")
@click.argument("destination")
@_replace
def copy(source: str, destination: str, *, replace: bool) -> None:
    """Copy the snapshot SOURCE as it is, with all packs that it names, to DESTINATION."""
    with _progress(f"copying {source}") as progress:
        store.copy_sync(source, destination, replace=replace, progress=progress)


@command.command()
@click.argument("place")
@click.option(
    "--grace",
    type=parameters.Seconds(0),
    default=GRACE,
    show_default=True,
    help="Seconds for which an object must have been unnamed: longer than any writer takes.",
)
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
def gc(place: str, *, grace: float, dry_run: bool) -> None:
    """Remove what no snapshot of the store PLACE, a folder or the URL of one, has named for a grace period.

    The first run only notes what is unnamed.
    """
    with _progress("reading manifests", is_bytes=False) as progress:
        removed = store.gc_sync(place, grace=grace, dry_run=dry_run, progress=progress)
    for entry in removed:
        when = dt.datetime.fromtimestamp(entry.modified, dt.UTC).isoformat(timespec="seconds")
        click.echo(f"{entry.path}  {_size(entry.size)}, written {when}")
    done = "would be removed" if dry_run else "removed"
    click.echo(f"{several(len(removed), 'object')}, {_size(sum(entry.size for entry in removed))} {done}")
