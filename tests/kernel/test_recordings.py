"""`server.recordings`: a session records at run time, whoever is killed, and goes on in the server after it."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import click
import pytest
from pattern import PAGE
from processes import kill
from scenario import eventually, play
from served import MIB, Serve, Servers

import aiouffd
from aiouffd.cli.unix_http import ControlClient
from aiouffd.engine.ahead.trace import Trace
from aiouffd.store import create_sync

PLACE = "/v1/sessions/vm/recording"


def touched(path: Path) -> set[int]:
    """Return the pages that a recording has as touched."""
    trace = Trace.load(path, PAGE)
    return {offset // PAGE for offset in set(trace.offsets).difference(trace.along)}


def pages_of(trace: Path) -> list[int]:
    """Return the pages of a recording, in order."""
    return [offset // PAGE for offset in Trace.load(trace).offsets]


def records(directory: str, worker: int) -> None:
    """Scenario: a client is there before the recording begins, and after it ends; a worker dies between."""
    control, trace = ControlClient(f"{directory}/control.sock"), Path(directory) / "trace"
    before, after = (100, 171, 310, 224, 352, 133), (500, 740, 611, 555, 860, 790)  # no streams

    def touch(*pages: int) -> None:
        for page in pages:
            assert region[page * PAGE] == (page + 1) & 255

    with aiouffd.Monitor(region := aiouffd.Region(4 * MIB), engine=aiouffd.ServedBy(f"{directory}/vm.sock")) as monitor:
        touch(1000)
        assert control.ask("POST", PLACE, {"path": str(trace)})["recording"] == str(trace)
        touch(*before)
        monitor.prefetch_sync(900 * PAGE, PAGE)  # answered: what has come before is noted
        kill(worker)
        touch(*after)
        monitor.prefetch_sync(901 * PAGE, PAGE)
        with aiouffd.Monitor(other := aiouffd.Region(4 * MIB), engine=aiouffd.ServedBy(f"{directory}/vm.sock")):
            assert other[1010 * PAGE] == 1011 & 255
            assert other[500 * PAGE] == 501 & 255
        (recorded,) = control.ask("DELETE", PLACE)
        assert touched(trace) == {*before, *after, 1010}
        about = {"path": str(trace), "pages": len(Trace.load(trace).offsets), "touched": 13, "carried": 0}
        assert recorded == about
        assert recorded["pages"] > 13
        touch(950)  # not recorded; and the file that has been completed is not written to

        control.ask("POST", PLACE, {"path": str(trace), "merge": "last", "most": 2 * PAGE, "pages": PAGE})
        for again in (960, 961, 820, 840):
            touch(again)
        monitor.prefetch_sync(902 * PAGE, PAGE)
        (recorded,) = control.ask("DELETE", PLACE)
        assert (recorded["pages"], recorded["carried"]) == (2, 1)
        carried = Trace.load(trace, PAGE).pages
        assert carried is not None
        assert list(carried.offsets) == [960 * PAGE]
        assert touched(trace) <= {960, 961, 820}
        assert len(pages_of(trace)) == 2
        assert pages_of(trace)[0] == 960


def test_a_session_records_at_run_time(image: Path, tmp_path: Path) -> None:
    """See the scenario; and what is refused says why."""
    with Serve(tmp_path, "--control", tmp_path / "control.sock", socket="") as serve:
        control = ControlClient(tmp_path / "control.sock")
        new = {"name": "vm", "socket": f"{tmp_path}/vm.sock", "source": str(image)}
        control.ask("POST", "/v1/sessions", new)
        play(records, str(tmp_path), serve.worker)
        create_sync(image, tmp_path / "x.snap")
        play(attached, str(tmp_path), str(tmp_path / "x.snap"))
        with pytest.raises(click.ClickException, match="does not serve a snapshot"):
            control.ask("POST", f"{PLACE}/attach", {"path": str(tmp_path / "trace")})
        refused = [
            ("DELETE", None, "'vm' records nothing"),
            ("POST", {"path": "x"}, "'x' is no absolute path"),
            ("POST", {"path": str(tmp_path / "no" / "x")}, "No such file"),
            ("POST", {"path": "/dev/null"}, "is not a regular file"),
            ("POST", {"path": "/x", "merge": "all"}, "merge"),
            ("POST", {"path": "/x", "most": 1}, "most"),
        ]
        for method, body, why in refused:
            with pytest.raises(click.ClickException, match=why):
                control.ask(method, PLACE, body)
        control.ask("POST", PLACE, {"path": str(tmp_path)})
        with pytest.raises(click.ClickException, match="records already, to "):
            control.ask("POST", PLACE, {"path": str(tmp_path)})
        assert control.ask("DELETE", PLACE) == []
        told = (event["kind"] for event in control.events(0))
        kinds = list(itertools.islice((kind for kind in told if kind.startswith("session.record")), 5))
        assert kinds == ["session.recording", "session.recorded"] * 2 + ["session.recording"]
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def replayed(monitor: aiouffd.Monitor) -> int:
    """Return how many pages a recording has brought."""
    return monitor.statistics().pages_replay


def attached(directory: str, served: str) -> None:
    """Scenario: what the clients of a session touch comes to those of the next one."""
    control, trace = ControlClient(f"{directory}/control.sock"), f"{directory}/of-snapshot"
    for name in ("first", "next"):
        new = {"name": name, "socket": f"{directory}/{name}.sock", "source": served, "readahead": 0}
        control.ask("POST", "/v1/sessions", new)
        with aiouffd.Monitor(
            region := aiouffd.Region(4 * MIB), engine=aiouffd.ServedBy(f"{directory}/{name}.sock")
        ) as monitor:
            if name == "next":
                eventually(partial(replayed, monitor), 2)
                continue
            control.ask("POST", "/v1/sessions/first/recording", {"path": trace})
            assert (region[700 * PAGE], region[3 * PAGE]) == (701 & 255, 4)
            monitor.prefetch_sync(900 * PAGE, PAGE)  # answered: what has come before is noted
            control.ask("DELETE", "/v1/sessions/first/recording")
        place = f"/v1/sessions/{name}/recording/attach"
        assert control.ask("POST", place, {"path": trace}) == {"snapshot": served, "bytes": 72 + 2 * 8}
        for path, why in ((served, "not a recording"), ("x", "no absolute path"), ("/none", "No such file")):
            with pytest.raises(click.ClickException, match=why):
                control.ask("POST", place, {"path": path})


def goes_on(directory: str, image: str) -> None:
    """Scenario: all of a server's processes but the holder are killed at once; what it has left is recorded again."""
    trace, control = Path(directory) / "trace", f"{directory}/control.sock"
    servers = Servers(directory, "--control", control, socket="")
    servers.start("first")
    new = {"name": "vm", "socket": f"{directory}/vm.sock", "source": image, "record": str(trace), "readahead": 0}
    asked = ControlClient(control)
    asked.ask("POST", "/v1/sessions", new)
    with aiouffd.Monitor(region := aiouffd.Region(MIB), engine=aiouffd.ServedBy(f"{directory}/vm.sock")):
        assert region[5 * PAGE] == 6
        servers.lose()
        servers.start("second")
        assert region[40 * PAGE] == 41
        assert asked.ask("GET", "/v1/sessions/vm")["recording"] == str(trace)
        (recorded,) = asked.ask("DELETE", PLACE)
        assert recorded["touched"] == 2
        assert pages_of(trace) == [5, 40]
        servers.lose()
        servers.start("third")
        assert asked.ask("GET", "/v1/sessions/vm").get("recording") is None  # it was stopped
        asked.ask("POST", PLACE, {"path": f"{trace}.again", "pages": MIB})
        assert region[90 * PAGE] == 91
        servers.lose()
        servers.start("fourth")
        (recorded,) = asked.ask("DELETE", PLACE)
        assert (recorded["touched"], recorded["carried"]) == (1, 1)
        assert pages_of(Path(f"{trace}.again")) == [90]
    assert servers.last.end() == 0


def test_a_recording_goes_on_in_the_server_after_it(image: Path, tmp_path: Path) -> None:
    """What was recorded before all were killed is in it, and what comes after."""
    play(goes_on, str(tmp_path), str(image))


def is_begun(directory: str, image: str) -> None:
    """Scenario: the command line of the second server says `--record`, and that of the third another file."""
    trace = Path(directory) / "trace"
    servers = Servers(directory, image, "--readahead", "0")
    servers.start("first")
    with aiouffd.Monitor(region := aiouffd.Region(MIB), engine=aiouffd.ServedBy(servers.socket)) as monitor:
        assert region[5 * PAGE] == 6
        servers.start("second", "--takeover", "--record", trace)
        assert region[40 * PAGE] == 41
        servers.start("third", "--takeover", "--record", f"{trace}.other")
        servers.last.says(f"touches are recorded to {trace} still, and not to {trace}.other")
        assert region[50 * PAGE] == 51
        monitor.prefetch_sync(60 * PAGE, PAGE)  # answered: what has come before is noted
    assert servers.last.end() == 0
    assert sorted(touched(trace)) == [40, 50], (sorted(touched(trace)), pages_of(trace))


def test_a_recording_begins_with_what_another_server_has_left(image: Path, tmp_path: Path) -> None:
    """`--record` that is added at a takeover is of the clients that are taken over."""
    play(is_begun, str(tmp_path), str(image))
