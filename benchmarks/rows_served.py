"""The rows of memory of other processes: what `aiouffd serve` and `aiouffd lazy-pages` bring."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import programs, served
from benchmarks.contestants import c_poll, monitored
from benchmarks.native import touch
from benchmarks.row import MIB, Bar, Row, Serve, processor, shuffled, touching

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator

    from benchmarks.contestants import Arena

__all__ = ["clients_row", "fetched_row", "program_rows", "restore_rows", "serve_rows", "sessions_row", "upgrade_row"]


def clients_row(*, quick: bool) -> Iterator[Row]:
    """Two hundred clients of one server, touches random over all."""
    size = (8 if quick else 64) * MIB
    page_by_page = ("--readahead", "0")
    yield Row(
        "serve-200",
        "200 clients of `aiouffd serve`, 1 toucher, random over all",
        "us/page",
        {
            "aiouffd": touching(lambda size: served.clients(size, 200, *page_by_page), size, 1),
            "one client": touching(lambda size: served.clients(size, 1, *page_by_page), size, 1),
        },
        (Bar("one client", 1.15),),
        setup="aiouffd serve --readahead 0",
    )


def sessions_row(*, quick: bool) -> Iterator[Row]:
    """Sessions of one server, created one after the other."""
    count = 20 if quick else 500
    yield Row(
        "sessions",
        f"a session of `aiouffd serve --control` is created, of {count}",
        "ms",
        {"aiouffd": lambda: served.creating(count), "5 ms": lambda: 5.0},
        (Bar("5 ms", 1.0),),
        setup="aiouffd serve --control",
    )


def upgrade_row(*, quick: bool) -> Iterator[Row]:
    """The pause that a client sees while another version takes over."""
    size, count = (16, 5) if quick else (64, 20)
    yield Row(
        "upgrade",
        f"the longest touch of one of {count} clients, while another `aiouffd serve` takes over",
        "ms",
        {"aiouffd": lambda: served.upgrading(size * MIB, count), "50 ms": lambda: 50.0},
        (Bar("50 ms", 1.0),),
        setup="aiouffd serve --readahead 0 --hold PATH --takeover",
    )


def restore_rows(*, quick: bool) -> Iterator[Row]:
    """A process that CRIU restores lazily, until it has read all its memory."""
    size = (8 if quick else 64) * MIB
    for name, when, again in (("criu", "", False), ("criu-again", ", within a second of another", True)):
        why = served.restore_unavailable(again=again)
        yield Row(
            name,
            f"lazy restore and full scan of {size // MIB} MiB{when}",
            "ms",
            {
                "aiouffd": served.restoring(served.our_daemon, size, again=again),
                "criu lazy-pages": served.restoring(served.own_daemon, size, again=again),
            },
            (Bar("criu lazy-pages", 1.0),),
            left_out={} if why is None else {"aiouffd": why},
            setup="aiouffd lazy-pages",
        )


def program_rows(*, quick: bool) -> Iterator[Row]:  # noqa: ARG001 - as all makers of rows
    """Programs as users restore them."""
    peer = "criu lazy-pages"
    for name in programs.PROGRAMS:
        why = programs.unavailable(name)
        ours, theirs = (programs.figures(name, daemon) for daemon in (served.our_daemon, served.own_daemon))
        for index, until in enumerate(("the first answer", "the daemon has ended")):
            yield Row(
                f"{name}-{'end' if index else 'answer'}",
                f"lazy restore of {name}, until {until}",
                "ms",
                {"aiouffd": ours[index], peer: theirs[index]},
                (Bar(peer, 1.0),),
                left_out={} if why is None else {"aiouffd": why},
                setup="aiouffd lazy-pages",
            )


def serve_rows(*, quick: bool) -> Iterator[Row]:
    """A microVM that touches 30 % of its memory at random, as it resumes from its snapshot."""
    size, share = (16 if quick else 256) * MIB, 0.3
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace"
        with monitored(size, readahead=0, record=trace) as arena:
            touch(arena.address, shuffled(size, share=share))
        for name, options in (("", ()), ("-page", ("--readahead", "0")), ("-replay", ("--replay", str(trace)))):
            contestants: dict[str, Serve] = {"aiouffd": partial(one_client, options), "C poll": c_poll}
            setup = " ".join(("aiouffd serve", *options[:1], *options[1:] * (name == "-page")))
            title = f"30 % of {size // MIB} MiB at random"
            for suffix, prefix, make in (("", "", touching), ("-cpu", "processor time of the handler: ", processor)):
                yield Row(
                    f"serve{name}{suffix}",
                    prefix + title,
                    "us/page",
                    {who: make(serve, size, 1, share) for who, serve in contestants.items()},
                    (Bar("C poll", 1.5),),
                    setup=setup,
                )


def one_client(options: tuple[str, ...], size: int) -> contextlib.AbstractContextManager[Arena]:
    """A server with one client."""
    return served.clients(size, 1, *options)


def fetched_row(*, quick: bool) -> Iterator[Row]:
    """Does a page come once from a page server that is far away?"""
    size = (8 if quick else 64) * MIB
    why = served.restore_unavailable(again=False)
    yield Row(
        "criu-fetched",
        "bytes from CRIU's page server, 5 ms away, a lazy byte",
        "bytes",
        {
            "aiouffd": lambda: served.fetched(served.our_daemon, size, 0.005),
            "criu lazy-pages": lambda: served.fetched(served.own_daemon, size, 0.005),
            "1": lambda: 1.0,
        },
        (Bar("1", 1.01),),
        repeats=3,
        left_out={} if why is None else {"aiouffd": why},
        setup="aiouffd lazy-pages --page-server",
    )
