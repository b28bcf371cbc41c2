"""`aiouffd ctl`: create, look at and delete the sessions of a server that runs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aiouffd.cli import parameters
from aiouffd.cli.unix_http import DEFAULT_TIMEOUT, ControlClient
from aiouffd.report.words import several
from aiouffd.store.place import absolute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["command", "control_option"]

_DEFAULT = "/run/aiouffd/control.sock"
_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print what the server answers.")
_WIDE = 10_000
_NAME = click.argument("name")
_OFFSET = click.option("--offset", type=parameters.Size(), default="0", help="Where to begin in the source.")
_LENGTH = click.option("--length", type=parameters.Size(), help="[default: to its end]")


class _Owner(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.3
    """UID or UID:GID."""

    name = "uid[:gid]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        """Return it as the server takes it."""
        if isinstance(value, dict):
            return value
        uid, _, gid = value.partition(":")
        if not uid.isdecimal() or (gid and not gid.isdecimal()):
            self.fail(f"{value!r} is no owner; write for example 1000 or 1000:1000", param, ctx)
        return {"uid": int(uid)} | ({"gid": int(gid)} if gid else {})


def control_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that says which server; several commands have it."""
    return click.option(
        "--control",
        type=click.Path(),
        default=_DEFAULT,
        show_default=True,
        envvar="AIOUFFD_CONTROL",
        show_envvar=True,
        help="The server's control socket.",
    )(command)


@click.group("ctl")
@control_option
@click.option(
    "--timeout",
    type=parameters.Seconds(0, min_open=True),
    default=DEFAULT_TIMEOUT,
    show_default=True,
    help="Seconds until a server has to answer at all; what it is asked to do may take longer.",
)
@click.pass_context
def command(ctx: click.Context, control: str, timeout: float) -> None:
    """Manage the sessions of a server: `aiouffd serve --control PATH`.

    Each session has a socket of its own, on which it takes the clients of one source.

    \b
    aiouffd ctl create vm1 /snapshots/base.mem --socket /run/vm1/uffd.sock
    aiouffd ctl list
    aiouffd ctl complete vm1
    aiouffd ctl delete vm1
    """  # noqa: D301 - a backspace is click's mark for lines that are kept
    ctx.obj = ControlClient(control, timeout)


@command.command()
@_NAME
@click.argument("source", nargs=-1, required=True)
@click.option("--socket", required=True, help="For its clients: an absolute path, or one in the jail.")
@click.option("--jail", metavar="DIRECTORY", help="Make the socket below this directory, whatever its user does there.")
@click.option("--mode", help="Of the socket's file. [default: 600]")
@click.option("--owner", type=_Owner(), help="Of the socket's file. This user may connect, too.")
@click.option("--allow-uid", "allow_uids", type=int, multiple=True, help="A further user that may connect; repeatable.")
@click.option("--on-reject", type=click.Choice(["poison", "kill", "hold"]), help="[default: poison]")
@click.option("--on-failure", type=click.Choice(["poison", "kill", "hold"]), help="[default: poison]")
@click.option("--readahead", type=parameters.Size(), metavar="BYTES", help="[default: 2M]")
@click.option("--background", type=parameters.Rate(), help="Bytes per second to fill without a fault, or max.")
@click.option("--record", help="Write the order of first touches to this file, or to files in this directory.")
@click.option("--replay", help="Prefetch the pages of such a file, or of those in a directory, for each client.")
@click.option("--timeout", type=parameters.Seconds(0, min_open=True), help="Of the source. [default: 30]")
@click.option("--retries", type=click.IntRange(0), help="Of a failed read.")
@click.option("--concurrent-reads", type=click.IntRange(1), help="The most reads at once. [default: 128]")
@click.option("--bytes-in-flight", type=parameters.Size(1 << 20), help="The most bytes of these. [default: 128M]")
@click.option("--one-copy", type=click.Choice(["small", "huge"]), help="Send clients memory to map privately.")
@click.option("--events-per-second", type=click.IntRange(1), help="The most faults and layout events, of all clients.")
@click.option("--nydus-answers", type=click.Choice(["length", "bare"]), help="[default: length]")
@click.option("--bytes-per-second", type=parameters.Size(1), help="The most bytes that are placed for all clients.")
@click.option("--max-resident", type=parameters.Size(1 << 20), help="The most bytes that are there, of one client.")
@_AS_JSON
@click.pass_obj
def create(control: ControlClient, /, name: str, source: Sequence[str], *, as_json: bool, **options: Any) -> None:
    """Create a session NAME, which serves SOURCE: a path or URL, or a base and the sparse files over it."""
    wanted = {key: value for key, value in options.items() if value is not None and value != ()}
    if wanted.get("background") == float("inf"):
        wanted["background"] = "max"
    for key in ("jail", "record", "replay", *(() if "jail" in wanted else ("socket",))):
        if key in wanted:
            wanted[key] = os.path.abspath(wanted[key])  # noqa: PTH100 - links are the server's to follow
    sources = [item if "://" in item else os.path.abspath(item) for item in source]  # noqa: PTH100 - as above
    new = {"name": name, "source": sources[0] if len(sources) == 1 else sources, **wanted}
    answer = control.ask("POST", "/v1/sessions", new)
    _say(answer, f"{name}: listening on {_socket_of(answer)}", as_json=as_json)


@command.command("list")
@_AS_JSON
@click.pass_obj
def list_(control: ControlClient, /, *, as_json: bool) -> None:
    """List the sessions."""
    sessions = control.ask("GET", "/v1/sessions")
    if as_json:
        click.echo(json.dumps(sessions))
        return
    columns = ("name", "state", "clients", "faults", "pages", "MiB fetched", "source errors", "socket")
    table = Table(*columns, box=None, header_style="bold")
    for session in sessions:
        counted = session["statistics"]
        fetched = f"{counted.get('bytes_fetched', 0) / (1 << 20):,.0f}"
        numbers = (str(len(session["clients"])), f"{counted.get('faults', 0):,}", f"{counted['pages']:,}", fetched)
        errors = f"{counted.get('source_errors', 0):,}"
        table.add_row(session["name"], session["state"], *numbers, errors, _socket_of(session))
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)  # a pipe gets each session on a line


@command.command()
@_NAME
@click.pass_obj
def show(control: ControlClient, /, name: str) -> None:
    """Print all that is known of a session, as JSON."""
    click.echo(json.dumps(control.ask("GET", _place(name)), indent=2))


@command.command()
@click.pass_obj
def server(control: ControlClient, /) -> None:
    """Print all that is known of the server, as JSON."""
    click.echo(json.dumps(control.ask("GET", "/v1/server"), indent=2))


def _ask_range(control: ControlClient, name: str, verb: str, offset: int, length: int | None) -> Any:
    """Ask for something to be done with a range of a session; no length: to its end."""
    wanted = {"offset": offset} | ({} if length is None else {"length": length})
    return control.ask("POST", f"{_place(name)}/{verb}", wanted)


@command.command()
@_NAME
@_OFFSET
@_LENGTH
@_AS_JSON
@click.pass_obj
def prefetch(control: ControlClient, /, name: str, offset: int, length: int | None, *, as_json: bool) -> None:
    """Bring a range of the source to all clients of a session, and wait until it is there."""
    answer = _ask_range(control, name, "prefetch", offset, length)
    _say(answer, f"{name}: brought to {several(len(answer['clients']), 'client')}", as_json=as_json)


@command.command()
@_NAME
@_OFFSET
@_LENGTH
@_AS_JSON
@click.pass_obj
def evict(control: ControlClient, /, name: str, offset: int, length: int | None, *, as_json: bool) -> None:
    """Drop a range of a session with --max-resident, as far as it was not written. A touch brings it again."""
    answer = _ask_range(control, name, "evict", offset, length)
    _say(answer, f"{name}: {several(answer['bytes'], 'byte')} dropped", as_json=as_json)


@command.command()
@_NAME
@click.argument("destination")
@click.option("--base", help="A snapshot in the same store. [default: what the session serves, if it is one there]")
@click.option("--whole", is_flag=True, help="Of no base.")
@click.option("--client", type=click.IntRange(1), help="Its number, where the session has several.")
@click.option("--rate", type=parameters.Rate(), help="Bytes per second to read at most.")
@click.option("--codec", type=click.Choice(["zstd", "lz4", "none"]), help="[default: zstd]")
@click.option("--level", type=int, help="Of zstd. [default: 3]")
@click.option("--replace", is_flag=True, help="Replace a snapshot of that name.")
@_AS_JSON
@click.pass_obj
def snapshot(control: ControlClient, /, name: str, destination: str, *, as_json: bool, **options: Any) -> None:
    """Write the memory of a client at one moment, while it runs: to DESTINATION, a .snap, or a plain file.

    The client must have given its memory file, and be registered for write protection. Control-C cancels it.
    """
    wanted = {key: value for key, value in options.items() if value not in (None, False, float("inf"))}
    wanted |= {key: absolute(value) for key, value in wanted.items() if key == "base"}
    with _progress(control, name):
        answer = control.ask("POST", f"{_place(name)}/snapshot", {"destination": absolute(destination), **wanted})
    figures = f"{answer['pause_ns'] / 1e6:.1f} ms pause, {answer['bytes']:,} bytes read, {answer['changed']:.1%}"
    _say(answer, f"{name}: written to {answer['destination']} ({figures})", as_json=as_json)


@contextlib.contextmanager
def _progress(control: ControlClient, name: str) -> Iterator[None]:
    """Show how far a snapshot is, on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()

    def show() -> None:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(name, total=None)
            while not ended.wait(0.2):
                with contextlib.suppress(click.ClickException):
                    found = control.ask("GET", f"{_place(name)}/snapshot")
                    progress.update(task, completed=found["bytes"], total=found["total"] or None)

    thread = threading.Thread(target=show)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@command.command()
@_NAME
@click.pass_obj
def cancel(control: ControlClient, /, name: str) -> None:
    """Have the snapshot of a session end that is being written."""
    control.ask("DELETE", f"{_place(name)}/snapshot")
    click.echo(f"{name}: canceled")


@command.command()
@_NAME
@click.argument("path", required=False)
@click.option("--stop", is_flag=True, help="Complete what is recorded.")
@click.option("--merge", type=click.Choice(["union", "frequency", "last"]), help="With a recording that is at PATH.")
@click.option("--limit", type=parameters.Size(4096), help="The most bytes of pages in one file. [default: 16G]")
@click.option("--pages", type=parameters.Size(4096), help="Also keep so many bytes of pages in it. [default: none]")
@_AS_JSON
@click.pass_obj
def record(
    control: ControlClient,
    /,
    name: str,
    path: str | None,
    merge: str | None,
    limit: int | None,
    pages: int | None,
    *,
    stop: bool,
    as_json: bool,
) -> None:
    """Record which pages the clients of a session touch, to PATH: a file, or a directory for one for each source.

    Then --stop has it written. What comes along with touched pages is marked in it: see `aiouffd trace`. With --pages
    it carries the bytes of the first pages, which a replay need not fetch, and only the server's user may read it.
    """
    place = f"{_place(name)}/recording"
    if stop != (path is None) or (stop and (merge or limit or pages)):
        raise click.UsageError("give either PATH, and how it is recorded, or --stop")
    if path is None:
        recorded = control.ask("DELETE", place)
        lines = [
            f"{each['path']}: {several(each['pages'], 'page')}, {each['touched']:,} touched"
            + (f", the bytes of {each['carried']:,}" if each["carried"] else "")
            for each in recorded
        ]
        _say(recorded, "\n".join(lines) or f"{name}: no client has come", as_json=as_json)
        return
    wanted = {"path": absolute(path), "merge": merge, "most": limit, "pages": pages}
    answer = control.ask("POST", place, {key: value for key, value in wanted.items() if value is not None})
    _say(answer, f"{name}: recording to {answer['recording']}", as_json=as_json)


@command.command()
@_NAME
@click.argument("path")
@parameters.merged_by("How it is merged with the recording that the snapshot has; or in its place.")
@click.option("--limit", type=parameters.Size(4096), help="The most bytes of pages. [default: 16G]")
@_AS_JSON
@click.pass_obj
def attach(control: ControlClient, /, name: str, path: str, by: str, limit: int | None, *, as_json: bool) -> None:
    """Keep the recording PATH with the snapshot that a session serves: what opens it from now on replays it."""
    wanted = {"path": absolute(path), "by": by} | ({} if limit is None else {"most": limit})
    answer = control.ask("POST", f"{_place(name)}/recording/attach", wanted)
    _say(answer, f"{answer['snapshot']}: has a recording of {answer['bytes']:,} bytes", as_json=as_json)


@command.command()
@_NAME
@_AS_JSON
@click.pass_obj
def complete(control: ControlClient, /, name: str, *, as_json: bool) -> int:
    """Bring all that the clients of a session miss, and let them go: they need no server any more.

    Exit status 1 if a client could not be completed: it is served on.
    """
    answer = control.ask("POST", f"{_place(name)}/complete")
    lines = [f"{name}: client {number}: {why}" for number, why in answer["failed"].items()]
    _say(answer, "\n".join(lines) or f"{name}: complete", as_json=as_json)
    return 1 if answer["failed"] else 0


@command.command()
@_NAME
@click.option("--wait", type=parameters.Seconds(0), default=0.0, help="Seconds, at most, until its clients have left.")
@_AS_JSON
@click.pass_obj
def drain(control: ControlClient, /, name: str, wait: float, *, as_json: bool) -> int:
    """Take no new clients; the session is deleted when the last one has left.

    Exit status 1 if clients are left after --wait.
    """
    answer = control.ask("POST", f"{_place(name)}/drain", {"wait": wait})
    left = len(answer["clients"])
    _say(answer, f"{name}: {several(left, 'client')} left" if left else f"{name}: drained", as_json=as_json)
    return 1 if left and wait else 0


@command.command()
@_NAME
@click.pass_obj
def delete(control: ControlClient, /, name: str) -> None:
    """Delete a session that serves nobody, or whose source could not be opened since the server's start.

    Clients of the latter are turned away, as its --on-failure says.
    """
    control.ask("DELETE", _place(name))
    click.echo(f"{name}: deleted")


@command.command()
@click.option(
    "--after", type=click.IntRange(0), help="Print first what came behind this number: 0 for all that is kept."
)
@click.option("--session", help="Of this one only.")
@_AS_JSON
@click.pass_obj
def events(control: ControlClient, /, after: int | None, session: str | None, *, as_json: bool) -> None:
    """Print what happens from now on, until the server ends; with --after also what has happened."""
    with contextlib.suppress(BrokenPipeError):
        for event in control.events(after):
            if session is None or event["session"] == session:
                when = datetime.fromtimestamp(event["time"]).astimezone().isoformat(timespec="milliseconds")
                details = " ".join(f"{key}={value}" for key, value in event["details"].items())
                said = f"{event['number']} {when} {event['kind']} {event['session'] or '-'} {details}".rstrip()
                _say(event, said, as_json=as_json)


def _place(name: str) -> str:
    return f"/v1/sessions/{quote(name, safe='')}"


def _say(answer: Any, text: str, *, as_json: bool) -> None:
    click.echo(json.dumps(answer) if as_json else text)


def _socket_of(session: dict[str, Any]) -> str:
    jail, path = session["settings"].get("jail"), session["settings"]["socket"]
    return f"{jail.rstrip('/')}/{path.lstrip('/')}" if jail else str(path)
