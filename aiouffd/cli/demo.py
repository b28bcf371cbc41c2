"""`aiouffd demo`: maps a file that an HTTP server holds, touches parts of it, and checks each touched byte."""

from __future__ import annotations

import time

import click
import rich.console
import rich.progress

import aiouffd
from aiouffd.cli import demo_parts, parameters

__all__ = ["command", "run"]


def run(*, size: int, threads: int, touches: int, latency: float) -> int:
    """Run the demo; return the exit status."""
    console = rich.console.Console()
    plain = not console.is_terminal or (console.encoding or "").lower().replace("-", "") != "utf8"
    with demo_parts.workplace() as directory:
        path = directory / "input.bin"
        with rich.progress.Progress(*demo_parts.columns(), console=console) as progress:
            demo_parts.make_input(path, size, progress)
            check = demo_parts.Check(path)
            with demo_parts.served(path, latency) as url:
                opened = time.perf_counter()
                with aiouffd.open(url) as region:
                    ready = time.perf_counter() - opened
                    seconds, seen = demo_parts.use(region, check, threads=threads, touches=touches, progress=progress)
                    drawn = demo_parts.picture(region, max(20, min(console.width, 100) - 4), plain=plain)
            check.close()
        console.print()
        console.print(
            f"  mapped       {size:>13,} bytes over HTTP, usable after {ready * 1000:.0f} ms", highlight=False
        )
        console.print(f"  touched      {check.touched.total:>13,} bytes", highlight=False)
        console.print(
            f"  fetched      {seen.bytes_fetched:>13,} bytes ({seen.bytes_fetched / size:.1%})", highlight=False
        )
        console.print(f"  page faults  {seen.faults:>13,} in {seconds:.1f} s", highlight=False)
        p50, p99 = (seen.latency_ns(quantile) / 1e6 for quantile in (0.5, 0.99))
        console.print(f"  latency      p50 below {p50:.3f} ms, p99 below {p99:.3f} ms", highlight=False)
        console.print("\n  what is present:")
        for line in drawn:
            console.print(f"  |{line}|", highlight=False, markup=False)
        return check.report(console)


@click.command("demo")
@click.option("--size", type=parameters.Size(), default="1G", show_default=True, help="Of the input file.")
@click.option("--threads", type=click.IntRange(1, 64), default=4, show_default=True, help="That touch at random.")
@click.option("--touches", type=click.IntRange(1), default=4000, show_default=True, help="Pages touched at random.")
@click.option("--latency-ms", type=float, default=0.0, show_default=True, help="Added to each answer of the server.")
@click.option(
    "--store", is_flag=True, help="The file is a snapshot in two layers; it is opened cold, and from a cache."
)
def command(*, size: int, threads: int, touches: int, latency_ms: float, store: bool) -> int:
    """Map a file that an HTTP server holds, touch parts of it, and check each touched byte."""
    if store:
        from aiouffd.cli import demo_store  # noqa: PLC0415 - another extra

        return demo_store.run(size=size, threads=threads, touches=touches, latency=latency_ms / 1000)
    return run(size=size, threads=threads, touches=touches, latency=latency_ms / 1000)
