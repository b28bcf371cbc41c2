"""`aiouffd cache`: look at a cache of chunks, check it, and make it smaller."""

from __future__ import annotations

from pathlib import Path

import click

from aiouffd.cli import parameters
from aiouffd.report.words import several
from aiouffd.store.cache import SMALLEST, ChunkCache

__all__ = ["command"]

_folder = click.argument("folder", type=click.Path(exists=True, file_okay=False))


@click.group("cache")
def command() -> None:
    """Look at, check and empty the cache of chunks in FOLDER (see `aiouffd serve --cache`).

    All of this may be done while it is in use.
    """


def _opened(folder: str) -> ChunkCache:
    if not (Path(folder) / "index").exists():
        raise click.ClickException(f"{folder}: there is no cache")
    # The limit is that of those who add chunks: nothing is added here. The index stays as large as it is.
    return ChunkCache(folder, SMALLEST)


@command.command()
@_folder
def info(folder: str) -> None:
    """Print what the cache holds, and what has been counted since it was made."""
    for name, value in _opened(folder).statistics().items():
        click.echo(f"{name:<10} {value:,}")


@command.command()
@_folder
def verify(folder: str) -> int:
    """Compare all chunks with their hashes, and forget those that differ. Exit status 1 if there were any."""
    chunks, damaged = _opened(folder).verify()
    click.echo(f"{folder}: {damaged:,} of {chunks:,} chunks were damaged" if damaged else f"{folder}: all is well")
    return 1 if damaged else 0


@command.command()
@_folder
@click.option("--size", type=parameters.Size(), required=True, help="The most bytes that are left.")
def trim(folder: str, size: int) -> None:
    """Remove what has not been used for longest."""
    click.echo(f"{folder}: {several(_opened(folder).trim(size), 'segment')} removed")


@command.command()
@_folder
def clear(folder: str) -> None:
    """Remove all chunks."""
    click.echo(f"{folder}: {several(_opened(folder).trim(0), 'segment')} removed")
