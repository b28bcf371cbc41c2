"""`server.clashes`: what excludes each other."""

from __future__ import annotations

import pytest

from aiouffd.engine.options import Options
from aiouffd.engine.serve.bounds import Limits
from aiouffd.server.clashes import CHOSEN, MAPPING, ClashError, check, why_not
from aiouffd.server.recordings import Recordings, Terms
from aiouffd.server.services import Services, Settings


def test_what_excludes_each_other() -> None:
    """Each pair is named, with the reason, and by the names of whoever asks; what goes together is let go."""
    check({"record", "one_copy", "client_events"})
    with pytest.raises(ClashError, match="give either record or replay: a recording does not see") as caught:
        check({"replay", "record", "one_copy"})
    assert caught.value.said(lambda name: f"--{name}").startswith("give either --record or --replay: ")
    assert why_not({"client_bytes"}, MAPPING).startswith("clients are limited")
    assert why_not({"replay", "one_copy"}, MAPPING) == ""
    assert why_not({MAPPING}, "record") == why_not({"record"}, MAPPING) != ""
    assert why_not({"record", "replay"}, MAPPING) == why_not({"record"}, MAPPING)  # not what the others exclude


def test_whoever_asks_hears_the_same() -> None:
    """Settings when they are made, services for a source that is chosen, and a recording that begins later."""
    bounded = Options(max_resident=1 << 20)
    with pytest.raises(ClashError, match="either record or max_resident"):
        Settings(record="r", options=bounded)
    with pytest.raises(ClashError, match=f"either one_copy or {CHOSEN}"):
        Services(lambda *_: None, Settings(options=Options(one_copy=4096)))
    for settings, other in ((Settings(options=bounded), "max_resident"), (Settings(replay="x"), "replay")):
        recordings = Recordings(None, "", settings.given(recorded=False))  # type: ignore[arg-type]
        with pytest.raises(ClashError, match=f"either record or {other}"):
            recordings.start(Terms("/x"))
        assert recordings.terms is None
    for limits in (Limits(client_events=1), Limits(client_bytes=1)):
        assert Services(lambda *_: None, Settings(options=Options(limits=limits))).unmappable
    recording = Recordings(None, "")  # type: ignore[arg-type]
    services = Services(lambda *_: None, Settings(), recording)
    assert not services.unmappable
    recording.is_beginning = True
    assert "touches are recorded here" in services.unmappable
    recording.is_beginning = False
    recording.terms = Terms("/x")
    assert "touches are recorded here" in services.unmappable
