"""`monitor.recording`: what a Monitor records and replays."""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from carried import made
from pattern import PAGE

import aiouffd
from aiouffd.engine.serve.bounds import Limits
from aiouffd.monitor.recording import Early, Tracing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 16 * PAGE


def test_what_was_recorded_is_replayed(tmp_path: Path) -> None:
    """From the same source; a recording that was given up leaves no file of that name."""
    path, region, source = tmp_path / "trace", aiouffd.Region(SIZE), aiouffd.ZeroSource(SIZE)
    given_up = Tracing(path, None, Limits())
    given_up.service(source, region)
    given_up.end(complete=False)
    assert not list(tmp_path.iterdir())
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


def test_an_error_of_the_program_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That the recording could not be written is logged then; else it is raised. Either names the file."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for raised in (None, ZeroDivisionError):
        recording = Tracing(tmp_path / "trace", None, Limits())
        service = recording.service(aiouffd.ZeroSource(SIZE), aiouffd.Region(SIZE))
        assert service.recorder is not None
        service.recorder.note(3 * PAGE)
        with pytest.raises(OSError, match=r"No space left.*/trace") if raised is None else contextlib.nullcontext():
            recording.end(complete=True, raised=raised)
        assert not list(tmp_path.iterdir())
    (record,) = caplog.records
    assert str(tmp_path / "trace") in record.getMessage()


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


def test_a_recording_is_read_early(tmp_path: Path) -> None:
    """Before its source is known. It stands for its path, and has those ready who replay it until it is closed."""
    path, source = made(tmp_path, list(range(20)))
    ready: list[bool] = []

    def expect() -> Callable[[], None]:
        ready.append(True)
        return lambda: ready.append(False)

    early = Early(path)
    early.expect(expect)
    assert (str(early), os.fspath(early), ready) == (str(path), str(path), [True])
    tracing = Tracing(None, early, Limits())
    trace = tracing.service(source, aiouffd.Region(source.size)).trace
    assert trace is early.take()
    assert tracing.registered() is None
    tracing.end(complete=True)
    tracing.end(complete=True)
    assert ready == [True, False]
    with pytest.raises(aiouffd.TraceError, match="another source"):
        Tracing(None, early, Limits()).service(aiouffd.BufferSource(bytes(source.size)), aiouffd.Region(source.size))


def test_a_registration_that_nobody_takes(tmp_path: Path) -> None:
    """It is undone when the recording is closed, or forgotten; who takes it has it alone."""
    undone: list[str] = []
    for name in ("taken", "closed", "forgotten"):
        early: Any = Early(tmp_path / name)
        early.registration = SimpleNamespace(abandon=partial(undone.append, name))
        if name == "taken":
            tracing = Tracing(None, early, Limits())
            assert tracing.registered() is not None
            assert tracing.registered() is None
        if name == "closed":
            early.close()
            early.close()
    del early
    assert undone == ["closed", "forgotten"]


def test_what_is_wrong_with_a_recording_that_is_read_early(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is raised when the recording is wanted. Where no pager is ready, it is replayed all the same."""
    path, _ = made(tmp_path, [1])

    def fails() -> Callable[[], None]:
        raise aiouffd.PagerStartError("no")

    early = Early(path)
    with caplog.at_level("DEBUG"):
        early.expect(fails)
    assert "nobody is ready to replay it: no" in caplog.text
    assert list(early.take().offsets) == [PAGE]
    missing, damaged = Early(tmp_path / "none"), Early(path)
    path.write_bytes(path.read_bytes()[:50])
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            missing.take()
        with pytest.raises(aiouffd.TraceError, match="truncated"):
            damaged.take()


def test_either_the_one_or_the_other(tmp_path: Path) -> None:
    """What a replay brings is not seen to be touched."""
    with pytest.raises(ValueError, match="either record or replay"):
        Tracing(tmp_path / "a", tmp_path / "b", Limits())
