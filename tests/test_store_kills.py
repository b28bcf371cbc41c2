"""Writers of snapshots that are killed, and several at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from scenario import play
from snapshots import CHUNK, an_image, packs_of, read_all

import aiouffd
from aiouffd.store import create_sync, gc_sync, layer, open_snapshot
from aiouffd.store.folder import unwritten

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DATA = an_image(61, 40, 17)
OLD = an_image(62, 7)
CALLS = ("open", "mkdir", "write", "fsync", "rename", "link", "unlink")
WRITER = """
import sys
from aiouffd.store import create_sync, layer
layer.PACK_BYTES = 1 << 18
source, destination, base = sys.argv[1:]
print("begin", flush=True)
create_sync(source, destination, base=base or None)
print("end", flush=True)
"""


def die_at(number: int, source: str, destination: str, replace: bool) -> None:
    """Write a snapshot, and be killed right before the `number`-th system call that changes something, or behind it."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return made

    layer.PACK_BYTES = 20 * CHUNK  # type: ignore[misc]
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    create_sync(source, destination, replace=replace)
    print("ended")


@pytest.mark.parametrize("replace", [False, True])
def test_a_writer_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool) -> None:
    """At any moment: the old snapshot or none, or the new one, whole. The next goes on where it was."""
    monkeypatch.setattr(layer, "PACK_BYTES", 20 * CHUNK)
    image, number, ended, taken_over = tmp_path / "vm.mem", 2 * replace, False, 0
    image.write_bytes(DATA)
    while not ended:
        number += 5
        place = tmp_path / str(number) / "x.snap"
        if replace:
            create_sync(OLD, place)
        try:
            play(die_at, number, str(image), str(place), replace, status=-signal.SIGKILL, measured=False)
        except AssertionError as error:
            if "ended with 0, not -9" not in str(error):
                raise
            ended = True
        assert place.exists() or not replace
        if place.exists():
            assert read_all(place) in ((OLD, DATA) if replace else (DATA,))
        before = {path: path.stat().st_mtime_ns for path in packs_of(place.parent) if not unwritten(str(path))}
        create_sync(image, place, replace=True)
        assert read_all(place) == DATA
        assert before.items() <= {path: path.stat().st_mtime_ns for path in packs_of(place.parent)}.items()
        taken_over += bool(before) and not ended
        gc_sync(place.parent, grace=0)
        assert not [path for path in place.parent.rglob("*") if unwritten(str(path))]
        assert read_all(place) == DATA
    assert number > 30
    assert taken_over > 1


def writer(source: Path, destination: Path, base: Path | None = None) -> subprocess.Popen[str]:
    """Start a writer whose packs are small; it has begun when this returns."""
    command = [sys.executable, "-c", WRITER, str(source), str(destination), str(base or "")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    return process


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file to make snapshots of."""
    path = tmp_path / "vm.mem"
    path.write_bytes(DATA)
    return path


def test_two_writers_at_once(image: Path, tmp_path: Path) -> None:
    """Of one image to one name: one of them wins. Of one image to two names: both are whole."""
    place = tmp_path / "store"
    same = [writer(image, place / "x.snap") for _ in range(2)]
    others = [writer(image, place / f"{name}.snap") for name in ("y", "z")]
    said = [process.communicate()[0] for process in (*same, *others)]
    assert sorted(said[:2]) in (["", "end\n"], ["end\n", "end\n"])
    assert said[2:] == ["end\n", "end\n"]
    assert sorted(path.name for path in place.glob("*.snap")) == ["x.snap", "y.snap", "z.snap"]
    assert all(read_all(path) == DATA for path in place.glob("*.snap"))
    manifests = [open_snapshot(path).manifest for path in place.glob("*.snap")]
    assert manifests[0] == manifests[1] == manifests[2]


def test_a_base_that_is_removed_and_collected_meanwhile(image: Path, tmp_path: Path) -> None:
    """No layer names packs that are gone."""
    place = tmp_path / "store"
    create_sync(OLD + DATA[len(OLD) :], place / "base.snap")
    process = writer(image, place / "x.snap", place / "base.snap")
    os.kill(process.pid, signal.SIGSTOP)
    (place / "base.snap").unlink()
    gc_sync(place, grace=0)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate()
    if (place / "x.snap").exists():
        assert read_all(place / "x.snap") == DATA  # it had not opened its base, or had done without it
    else:
        with pytest.raises(aiouffd.StoreError):
            open_snapshot(place / "x.snap")
