"""`aiouffd top`: the sessions of a server that runs, and what they do just now."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from aiouffd.cli import ctl, parameters
from aiouffd.cli.unix_http import ControlClient

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["command", "table"]

_MIB = 1 << 20


@click.command("top")
@ctl.control_option
@click.option(
    "--interval", type=parameters.Seconds(0.1), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Print one table, of one interval, and end.")
def command(*, control: str, interval: float, once: bool) -> None:
    """Show what the sessions of `aiouffd serve --control PATH` do, the busiest first, until Ctrl-C."""
    client = ControlClient(control)
    console = Console(width=None if sys.stdout.isatty() else 200)
    before = _look(client)
    with Live(console=console, screen=console.is_terminal and not once, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            now = _look(client)
            live.update(table(before, now, interval), refresh=True)
            if once:
                return
            before = now


def _look(client: ControlClient) -> dict[str, Any]:
    return {session["name"]: session for session in client.ask("GET", "/v1/sessions")}


def table(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> Table:
    """Return what has happened between two looks, a row for each session."""
    shown = Table(box=None, header_style="bold")
    for name in (
        "session",
        "state",
        "clients",
        "faults/s",
        "pages/s",
        "MiB/s",
        "p99",
        "poisoned",
        "slowed",
        "rejected",
    ):
        shown.add_column(name, justify="left" if name in {"session", "state"} else "right", no_wrap=True)

    def rate(session: Any, name: str) -> float:
        new: int = session["statistics"].get(name, 0)
        old: int = before.get(session["name"], session)["statistics"].get(name, 0)
        return max(new - old, 0) / seconds

    for session in sorted(now.values(), key=lambda session: rate(session, "faults"), reverse=True):
        counted = session["statistics"]
        shown.add_row(
            *(session["name"], session["state"], str(len(session["clients"]))),
            *(f"{rate(session, name):,.0f}" for name in ("faults", "pages")),
            f"{rate(session, 'bytes_fetched') / _MIB:,.1f}",
            f"{counted['latency_p99_ns'] / 1e6:,.2f} ms",
            *(f"{counted.get(name, 0):,}" for name in ("pages_poisoned", "slowed")),
            f"{session['rejected']:,}",
        )
    return shown
