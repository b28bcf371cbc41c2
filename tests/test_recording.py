"""`monitor.recording`: what a Monitor records and replays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pattern import PAGE

import aiouffd
from aiouffd.engine.serve.bounds import Limits
from aiouffd.monitor.recording import Tracing

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 16 * PAGE


def test_what_was_recorded_is_replayed(tmp_path: Path) -> None:
    """From the same source; a recording that was given up leaves no file of that name."""
    path, region, source = tmp_path / "trace", aiouffd.Region(SIZE), aiouffd.ZeroSource(SIZE)
    given_up = Tracing(path, None, Limits())
    given_up.service(source, region)
    given_up.end(complete=False)
    assert not path.exists()
    recording = Tracing(path, None, Limits())
    service = recording.service(source, region)
    assert (service.origin, service.trace) == (source, None)
    assert service.recorder is not None
    service.recorder.note(3 * PAGE)
    recording.end(complete=True)
    recording.end(complete=True)  # a second time, it is over
    replayed = Tracing(None, path, Limits()).service(source, region)
    assert replayed.recorder is None
    assert replayed.trace is not None
    assert list(replayed.trace.offsets) == [3 * PAGE]


def test_a_recording_of_another_source_is_refused(tmp_path: Path) -> None:
    """Its fingerprint is another, or its size is."""
    path, region = tmp_path / "trace", aiouffd.Region(SIZE)
    recording = Tracing(path, None, Limits())
    recording.service(aiouffd.ZeroSource(SIZE), region)
    recording.end(complete=True)
    with pytest.raises(aiouffd.TraceError, match="another source"):
        Tracing(None, path, Limits()).service(aiouffd.ZeroSource(SIZE - PAGE), region)
    with pytest.raises(aiouffd.TraceError, match="its size is another"):
        Tracing(None, path, Limits()).service(aiouffd.BufferSource(bytes(SIZE - PAGE)), aiouffd.Region(SIZE - PAGE))


def test_either_the_one_or_the_other(tmp_path: Path) -> None:
    """What a replay brings is not seen to be touched."""
    with pytest.raises(ValueError, match="either record or replay"):
        Tracing(tmp_path / "a", tmp_path / "b", Limits())
