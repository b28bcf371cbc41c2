"""`aiouffd top`: the sessions of a server that runs, and what they do just now."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aiouffd.cli import ctl, parameters
from aiouffd.cli.unix_http import ControlClient
from aiouffd.report.words import often

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

__all__ = ["command", "table"]

_MIB = 1 << 20
_RECENT = 10.0  # seconds for which is told what was slow or has failed
_WIDTHS = {"state": 30, "p99": 11}  # of a narrow terminal the source gives up most


@click.command("top")
@ctl.control_option
@click.option(
    "--interval", type=parameters.Seconds(0.1), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Print one table, of one interval, and end.")
def command(*, control: str, interval: float, once: bool) -> None:
    """Show what the sessions of `aiouffd serve --control PATH` do, those in trouble first, until Ctrl-C."""
    client = ControlClient(control)
    console = Console(width=None if sys.stdout.isatty() else 200)
    before, past = _look(client), deque[tuple[float, dict[str, Any]]]()
    with Live(console=console, screen=console.is_terminal and not once, auto_refresh=False) as live:
        if not once:
            _show(live, about(client.ask("GET", "/v1/server")), table([before], before, interval))
        while True:
            time.sleep(interval)
            now, server = _look(client), client.ask("GET", "/v1/server")
            past.append((time.monotonic(), before))
            while past[0][0] < time.monotonic() - _RECENT - interval:
                past.popleft()
            _show(live, about(server), table([look for _, look in past], now, interval))
            if once:
                return
            before = now


def _show(live: Live, *parts: RenderableType) -> None:
    shown = Group(*parts)
    if live.console.is_terminal:
        live.update(shown, refresh=True)
    else:  # it would print to a pipe at the end
        live.console.print(shown)


def _look(client: ControlClient) -> dict[str, Any]:
    return {session["name"]: session for session in client.ask("GET", "/v1/sessions")}


def about(server: Mapping[str, Any]) -> Text:
    """Return what is said of the server: who serves, and what may be restarted."""
    counted = server["statistics"]
    replaced = f", its worker was replaced {often(counted['restarts'])}" if counted.get("restarts") else ""
    pager = " ".join(map(str, server["pager"]))
    return Text("\n".join([f"aiouffd {server['version']}, pager {pager}{replaced}", *server["restarts"]]) + "\n")


def _why(session: Mapping[str, Any], past: Sequence[Mapping[str, Any]], now: float) -> tuple[int, str]:
    """Return how bad it is (0: the worst), and in words what a session waits for, or what is wrong with it."""
    old = past[-1]

    def grew(name: str, looks: Sequence[Mapping[str, Any]] = past) -> bool:
        return any(session["statistics"].get(name, 0) > look["statistics"].get(name, 0) for look in looks)

    reads = session["statistics"].get("in_flight", 0) and old["statistics"].get("in_flight", 0)
    slow = session["slow"]
    if grew("source_errors"):
        return 0, "its source fails"
    if grew("source_retries"):
        return 0, "its source is asked again"
    if reads and not (grew("bytes_fetched", [old]) or grew("source_reads", [old])):
        return 0, "its source does not answer"
    if grew("slowed"):
        return 1, "slowed by its limits"
    if slow and slow["time"] > now - _RECENT:
        return 1, f"slow: waited {slow['took_ns'] / 1e6:,.0f} ms ({slow['cause']})"
    return 2, session["state"]


def table(past: Sequence[Mapping[str, Any]], now: Mapping[str, Any], seconds: float) -> Table:
    """Return what has happened since the last of the looks before, a row for each session."""
    before = past[-1]
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
        "source",
    ):
        side: Literal["left", "right"] = "left" if name in {"session", "state", "source"} else "right"
        shown.add_column(name, justify=side, no_wrap=True, min_width=_WIDTHS.get(name, len(name)))

    def rate(session: Any, name: str) -> float:
        new: int = session["statistics"].get(name, 0)
        old: int = before.get(session["name"], session)["statistics"].get(name, 0)
        return max(new - old, 0) / seconds

    moment = time.time()
    whys = {}
    for name, session in now.items():
        whys[name] = _why(session, [look[name] for look in past if name in look] or [session], moment)
    order = sorted(now.values(), key=lambda session: (whys[session["name"]][0], -rate(session, "faults")))
    for session in order:
        counted = session["statistics"]
        shown.add_row(
            *(session["name"], whys[session["name"]][1], str(len(session["clients"]))),
            *(f"{rate(session, name):,.0f}" for name in ("faults", "pages")),
            f"{rate(session, 'bytes_fetched') / _MIB:,.1f}",
            f"{counted['latency_p99_ns'] / 1e6:,.2f} ms",
            *(f"{counted.get(name, 0):,}" for name in ("pages_poisoned", "slowed")),
            f"{session['rejected']:,}",
            session["source"],
        )
    return shown
