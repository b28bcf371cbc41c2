"""`engine.trace`: what is noted is read back, and nothing else is taken for a recording."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import struct
import zlib
from array import array
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pattern import PAGE
from scenario import open_descriptors

from aiouffd.engine.ahead.pages import Recording
from aiouffd.engine.ahead.trace import (
    _SAMPLE,
    _SAMPLES,
    HEADER,
    HEADER_1,
    Recorder,
    Trace,
    begin,
    differ,
    fingerprint,
    stored,
)
from aiouffd.engine.readahead import Readahead
from aiouffd.errors import SourceError, TraceError
from aiouffd.kernel.owned_descriptor import OwnedDescriptor, inode
from aiouffd.sources.base import Descriptor, ZeroSource
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 30


def record(path: Path, offsets: list[int]) -> bytes:
    """Write a recording; return the file."""
    recorder = Recorder.create(path, PAGE, SIZE)
    for offset in offsets:
        recorder.note(offset)
    recorder.complete()
    return path.read_bytes()


def test_the_order_is_kept_and_each_page_is_there_once(tmp_path: Path) -> None:
    """Also with more pages than the file grows by at once."""
    offsets = [(number * 7919 % 200_000) * PAGE for number in range(200_000)]
    record(tmp_path / "trace", [*offsets, *offsets[:100]])
    trace = Trace.load(tmp_path / "trace", PAGE)
    assert list(trace.offsets) == offsets
    assert (trace.page_size, trace.size) == (PAGE, SIZE)
    assert not (tmp_path / "trace.part").exists()


def test_a_successor_goes_on_where_its_predecessor_was_killed(tmp_path: Path) -> None:
    """What was noted is in the file at once; who comes next is given the same descriptor."""
    recorder = Recorder.create(tmp_path / "trace", PAGE, SIZE)
    for number in (1, 2):
        make, arguments = recorder.travel()
        (descriptor,) = arguments
        other = make(Descriptor(os.dup(descriptor.fd)))
        other.note(number * PAGE)
        other._map = None  # killed: nothing is closed or written any more
    recorder.complete()
    assert list(Trace.load(tmp_path / "trace", PAGE).offsets) == [PAGE, 2 * PAGE]


def test_what_was_noted_by_now_is_a_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others go on noting, and lose nothing that they stand on; an older one stays where there is no room."""
    path, many = tmp_path / "trace", [number * PAGE for number in range(200_000)]
    recorder = Recorder.create(path, PAGE, SIZE)
    module = "aiouffd.engine.ahead.trace"
    with Recorder(os.dup(recorder.fileno())) as other:
        for offset in many[:3]:
            other.note(offset)
        recorder.complete_now()
        assert list(Trace.load(path).offsets) == many[:3]
        for offset in many:
            other.note(offset)
    assert list(Trace.load(path).offsets) == many[:3]
    again = Recorder.create(path, PAGE, SIZE)
    monkeypatch.setattr(f"{module}.write_at", Mock(side_effect=OSError(errno.ENOSPC, "no room")))
    with pytest.raises(OSError, match="no room"):
        again.complete_now()
    assert list(Trace.load(path).offsets) == many[:3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace"]


def test_what_came_along_is_marked(tmp_path: Path) -> None:
    """Until it is touched; each page is there once, in order, also behind a predecessor's; saved, it is the same."""
    recorder = Recorder.create(tmp_path / "trace", PAGE, SIZE)
    recorder.note(2 * PAGE, PAGE, 3 * PAGE)
    successor = Recorder(os.dup(recorder.fileno()))
    successor.note(-1, 3 * PAGE, 3 * PAGE)
    for touched in (3, 2, 5):
        successor.note(touched * PAGE, 0, 0)
    recorder.complete()
    trace = Trace.load(tmp_path / "trace", PAGE)
    assert [offset // PAGE for offset in trace.offsets] == [2, 1, 3, 4, 5]
    assert [offset // PAGE for offset in trace.along] == [1, 4]
    assert len((tmp_path / "trace").read_bytes()) == HEADER.size + 7 * 8
    trace.save(tmp_path / "saved")
    assert Trace.load(tmp_path / "saved") == trace


def test_the_pages_of_a_stride_are_noted(tmp_path: Path) -> None:
    """They come in windows of one page each, of which one was touched."""
    recorder = Recorder.create(tmp_path / "trace", PAGE, SIZE)
    readahead, asked = Readahead(PAGE, 2 << 20, 16 << 10, recorder.note), list[int]()
    for number in range(3, 2000, 7):
        offset = number * PAGE
        if readahead.missing(offset, offset + PAGE):
            asked.append(offset)
            readahead.windows(offset, 0, SIZE)
    recorder.complete()
    trace = Trace.load(tmp_path / "trace")
    assert len(asked) < 100
    assert {number * PAGE for number in range(3, 2000, 7)} <= set(trace.offsets)
    assert [offset for offset in trace.offsets if offset not in trace.along] == asked


def test_a_recording_that_was_not_completed_leaves_the_old_one_alone(tmp_path: Path) -> None:
    """The name is given when all is there; nobody has its file open once the recorder is gone."""
    record(tmp_path / "trace", [PAGE])
    before = open_descriptors()
    Recorder.create(tmp_path / "trace", PAGE, SIZE).note(2 * PAGE)
    assert open_descriptors() == before
    assert list(Trace.load(tmp_path / "trace", PAGE).offsets) == [PAGE]
    with pytest.raises(TraceError, match="not completed"):
        Trace.load(tmp_path / "trace.part", PAGE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:0], "0 bytes are too few"),
        (lambda data: data[:20], "20 bytes are too few"),
        (lambda data: b"AIOUFFD" + data[7:], "not a recording"),
        (lambda data: data[:8] + struct.pack("<I", 6) + data[12:], "version is 6"),
        (lambda data: data[:8] + struct.pack("<I", 0) + data[12:], "version is 0"),
        (lambda data: data[:-8], "truncated"),
        (lambda data: data[:-3], "truncated"),
        (lambda data: data + bytes(8), "truncated"),
        (lambda data: data[:-8] + bytes(8), "checksum"),
        (lambda data: data[:36] + bytes(4) + data[40:], "not completed"),
    ],
)
def test_what_is_no_recording_is_an_error_that_says_why(tmp_path: Path, change: object, message: str) -> None:
    """Wrong, truncated, damaged, of another version."""
    data = record(tmp_path / "trace", [PAGE, 3 * PAGE])
    assert callable(change)
    (tmp_path / "trace").write_bytes(change(data))
    with pytest.raises(TraceError, match=message) as caught:
        Trace.load(tmp_path / "trace", PAGE)
    assert str(tmp_path / "trace") in str(caught.value)


def test_a_recording_of_other_pages(tmp_path: Path) -> None:
    """It is for one page size, and names only pages that can be."""
    record(tmp_path / "trace", [PAGE])
    with pytest.raises(TraceError, match="pages of 4096 bytes, not 2097152"):
        Trace.load(tmp_path / "trace", 2 << 20)
    for version, offset in ((3, SIZE), (3, 17), (3, 2), (2, PAGE + 1)):
        body = struct.pack("<Q", offset)
        head = HEADER.pack(b"aiouffd\0", version, PAGE, SIZE, 1, zlib.crc32(body), 1, bytes(32))
        (tmp_path / "trace").write_bytes(head + body)
        with pytest.raises(TraceError, match="cannot exist"):
            Trace.load(tmp_path / "trace", PAGE)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_or_a_recording(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Nothing else is raised."""
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    numbers = (PAGE, SIZE, len(data) // 8, zlib.crc32(data), 1)
    head = HEADER.pack(b"aiouffd\0", 2, *numbers, bytes(32))
    marked = head[:8] + struct.pack("<I", 3) + head[12:]
    for content in (data, head + data, marked + data, HEADER_1.pack(b"aiouffd\0", 1, *numbers) + data):
        path.write_bytes(content)
        try:
            trace = Trace.load(path, PAGE)
        except TraceError:
            continue
        assert list(trace.offsets) == [*dict.fromkeys(trace.offsets)]


@given(st.lists(st.integers(0, 10_000), unique=True, max_size=300))
def test_ranges_bring_each_page_once(pages: list[int]) -> None:
    """Merged where pages follow each other, and behind each batch the index to go on from."""
    trace = Trace(PAGE, SIZE, array("Q", [page * PAGE for page in pages]))
    found: list[int] = []
    for index, ranges in trace.ranges():
        brought = [page for start, length in ranges for page in range(start, start + length, PAGE)]
        assert brought == sorted(set(brought))
        found += brought
        assert all(low[0] + low[1] < high[0] for low, high in pairwise(ranges))
        assert set(found) == set(trace.offsets[:index])
    assert len(found) == len(pages)


# Of which source


def test_a_recording_of_another_source_is_refused(tmp_path: Path) -> None:
    """It would bring pages that nobody will touch. A copy of the file, and the same bytes in memory, are the same."""
    data = bytearray(b"".join(bytes([n % 251]) * PAGE for n in range(500)))
    (tmp_path / "one").write_bytes(data)
    (tmp_path / "copy").write_bytes(data)
    data[-1] ^= 1
    (tmp_path / "other").write_bytes(data)
    (tmp_path / "longer").write_bytes(data + b"x")
    one, copy, other, longer = (fingerprint(FileSource(tmp_path / name)) for name in ("one", "copy", "other", "longer"))
    Recorder.create(tmp_path / "trace", PAGE, SIZE, one).complete()
    for same in (copy, fingerprint(BufferSource((tmp_path / "one").read_bytes()))):
        assert Trace.load(tmp_path / "trace", PAGE, source=same).source == one
    for different in (other, longer):
        with pytest.raises(TraceError, match="another source"):
            Trace.load(tmp_path / "trace", PAGE, source=different)
    assert Trace.load(tmp_path / "trace", PAGE).source == one


class Served:
    """A source whose server gives a validator."""

    size = 5

    def __init__(self, validator: str | None) -> None:
        self.validator = validator


def test_what_a_fingerprint_is_of() -> None:
    """Of content, of a validator, of a size, or of nothing; only what is alike is compared."""
    kinds = [fingerprint(BufferSource(b"abcde")), fingerprint(Served("x")), fingerprint(ZeroSource(5)), fingerprint(1)]
    assert [kind[0] for kind in kinds] == [1, 2, 3, 0]
    assert all(len(kind) == 32 for kind in kinds)
    assert not any(differ(one, other) for one in kinds for other in kinds)
    assert differ(fingerprint(Served("x")), fingerprint(Served("y")))
    assert differ(fingerprint(ZeroSource(5)), fingerprint(Served(None))) is False
    assert differ(fingerprint(ZeroSource(5)), fingerprint(ZeroSource(6)))
    assert fingerprint(BufferSource(b""))[0] == 1


@pytest.mark.parametrize("size", [0, 5, _SAMPLE + 1, 300 * _SAMPLE + 1])
def test_a_fingerprint_is_of_the_size_and_of_samples_from_all_over(size: int) -> None:
    """Of the first bytes and of the last ones, too; a copy of a file shares it."""
    taken: list[tuple[int, int]] = []

    class Sampled:
        def sample(self, offset: int, length: int) -> bytes:
            taken.append((offset, length))
            return b"%d+%d " % (offset, length)

    source: Any = Sampled()
    source.size = size
    found = fingerprint(source)
    hashed = b"%d:" % size + b"".join(b"%d+%d " % sample for sample in taken)
    assert found == b"\1" + blake2b(hashed, digest_size=31).digest()
    assert taken == sorted(set(taken))
    assert all(offset % _SAMPLE == 0 and length == min(_SAMPLE, size - offset) for offset, length in taken)
    if size:
        assert (taken[0][0], sum(taken[-1])) == (0, size)
    assert len(taken) == min(_SAMPLES, -(-size // _SAMPLE))


def test_a_fingerprint_of_what_is_served_is_of_size_and_validator() -> None:
    """Both count."""
    assert fingerprint(Served("x")) == b"\2" + blake2b(b"5:x", digest_size=31).digest()
    assert fingerprint(Served(None)) == b"\3" + blake2b(b"5:", digest_size=31).digest()


def test_the_first_version_is_still_read(tmp_path: Path) -> None:
    """It says nothing of its source."""
    body = struct.pack("<2Q", PAGE, 5 * PAGE)
    head = HEADER_1.pack(b"aiouffd\0", 1, PAGE, SIZE, 2, zlib.crc32(body), 1)
    (tmp_path / "trace").write_bytes(head + body)
    trace = Trace.load(tmp_path / "trace", PAGE, source=fingerprint(ZeroSource(5)))
    assert (list(trace.offsets), trace.source) == ([PAGE, 5 * PAGE], bytes(32))


# Where to


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "link to a fifo"])
def test_what_is_no_regular_file_is_left_alone(tmp_path: Path, kind: str) -> None:
    """A device node among them: it would be replaced by a file. The same beside it, under the name of the part."""
    for name in ("trace", "trace.part"):
        path = tmp_path / name
        if kind == "directory":
            path.mkdir()
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(str(path))
        else:
            target = tmp_path / "target" if kind == "link to a fifo" else path
            os.mkfifo(target)
            if target != path:
                path.symlink_to(target)
        before = path.lstat().st_ino
        with pytest.raises(OSError) as caught:  # noqa: PT011 - it depends on the kind
            Recorder.create(tmp_path / "trace", PAGE, SIZE)
        assert caught.value.filename == str(tmp_path / "trace")
        assert path.lstat().st_ino == before
        for made in sorted(tmp_path.iterdir()):
            made.rmdir() if made.is_dir() else made.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device node needs root")
def test_a_device_node_is_left_alone(tmp_path: Path) -> None:
    """As in `--record /dev/null`."""
    path = tmp_path / "null"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this user may make no device nodes")
    with pytest.raises(OSError, match="is not a regular file"):
        Recorder.create(path, PAGE, SIZE)
    assert stat.S_ISCHR(path.stat().st_mode)


def test_a_link_stays(tmp_path: Path) -> None:
    """What it leads to is replaced."""
    (tmp_path / "link").symlink_to(tmp_path / "trace")
    record(tmp_path / "link", [PAGE])
    assert (tmp_path / "link").is_symlink()
    assert list(Trace.load(tmp_path / "trace").offsets) == [PAGE]


def test_an_error_names_the_path(tmp_path: Path) -> None:
    """Also of a `Recording`."""
    with pytest.raises(FileNotFoundError) as caught:
        Recorder.create(Recording(tmp_path / "no" / "trace", pages=True), PAGE, SIZE)
    assert caught.value.filename == str(tmp_path / "no" / "trace")


def test_two_that_record_to_one_path(tmp_path: Path) -> None:
    """The second is refused: it would write into the first one's file."""
    first = Recorder.create(tmp_path / "trace", PAGE, SIZE)
    with pytest.raises(OSError, match="another process records there"):
        Recorder.create(tmp_path / "trace", PAGE, SIZE)
    first.note(PAGE)
    first.complete()
    assert list(Trace.load(tmp_path / "trace").offsets) == [PAGE]


def test_what_others_can_read_gets_no_bytes(tmp_path: Path) -> None:
    """What a recording that was killed has left is a new file where it is to carry bytes; else it is used again."""
    path, part = tmp_path / "a", tmp_path / "a.part"
    part.touch(0o644)
    with part.open("rb") as other:
        with OwnedDescriptor(begin(path)) as file:
            assert inode(file.fileno()) == inode(other.fileno())
        for is_same in (False, True):  # the next is its own
            before = part.stat().st_ino
            with OwnedDescriptor(begin(path, 0o600)) as file:
                os.write(file.fileno(), b"secret")
                assert stat.S_IMODE(part.stat().st_mode) == 0o600
                assert (part.stat().st_ino == before) == is_same
        assert other.read() == b""
    assert part.read_bytes() == b"secret"


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing recorded is no recording, and an older one stays; what was recorded until then is kept."""
    record(tmp_path / "trace", [7 * PAGE])
    recorder = Recorder.create(tmp_path / "trace", PAGE, SIZE)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        recorder.note(PAGE)
    with pytest.raises(OSError, match="nothing was recorded") as caught:
        recorder.complete()
    assert caught.value.errno == errno.ENOSPC
    assert list(Trace.load(tmp_path / "trace").offsets) == [7 * PAGE]
    recorder = Recorder.create(tmp_path / "trace", PAGE, SIZE)
    recorder.note(PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            recorder.complete()
    assert caught.value.filename == str(tmp_path / "trace")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left") as caught:
            Recorder.create(tmp_path / "trace", PAGE, SIZE)
    assert caught.value.filename == str(tmp_path / "trace")
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]  # nothing is left behind, neither time
    recorder = Recorder.create(tmp_path / "trace", PAGE, 1 << 40)
    recorder.note(PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        for number in range(2, 140_000):
            recorder.note(number * PAGE)
    recorder.complete()
    assert 100_000 < len(Trace.load(tmp_path / "trace").offsets) < 139_999


def test_a_process_with_too_many_files_open_records_on(tmp_path: Path) -> None:
    """Who notes a page is about to bring it: nothing is raised there, and no descriptor is needed."""
    recorder = Recorder.create(tmp_path / "trace", PAGE, 1 << 40)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        recorder.note(0)
        recorder.note_pages(range(PAGE, 140_000 * PAGE, PAGE))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    recorder.complete()
    assert len(Trace.load(tmp_path / "trace").offsets) == 140_000


def test_many_pages_are_noted_together(tmp_path: Path) -> None:
    """As if one by one: each once, in order, what came along too, and up to the last for which there is room."""
    recorder = Recorder.create(tmp_path / "trace", PAGE, SIZE)
    fd = os.dup(recorder.fileno())
    noting = Recorder(fd, most=6 * PAGE)
    noting.note(2 * PAGE, PAGE, 3 * PAGE)
    noting.note_pages([9 * PAGE, 2 * PAGE, 3 * PAGE, 9 * PAGE])
    noting.note(-1, 9 * PAGE, PAGE)
    noting.note_pages([5 * PAGE, 6 * PAGE])
    noting.note_pages([7 * PAGE])
    assert noting.is_full
    recorder.complete()
    trace = Trace.load(tmp_path / "trace")
    assert [offset // PAGE for offset in trace.offsets] == [2, 1, 3, 9, 5]
    assert list(trace.along) == [PAGE]


def test_what_a_source_has_recorded_of_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is replayed if it fits; if not, or if it cannot be had, that is logged."""

    class Kept:
        def __init__(self, content: bytes | Exception | None) -> None:
            self.content = content

        def recording(self) -> bytes | None:
            if isinstance(self.content, Exception):
                raise self.content
            return self.content

    recorder = Recorder.create(tmp_path / "r", 4096, 1 << 20)
    recorder.note(8192)
    recorder.complete()
    data = (tmp_path / "r").read_bytes()
    found = stored(Kept(data), 4096)
    assert found is not None
    assert list(found.offsets) == [8192]
    assert stored(Kept(None), 4096) is None
    assert stored(object(), 4096) is None
    assert not caplog.records
    assert stored(Kept(data), 16384) is None
    assert stored(Kept(data[:-1]), 4096) is None
    assert stored(Kept(SourceError("x", 0, 0, "gone")), 4096) is None
    assert ["nothing is replayed" in record.message for record in caplog.records] == [True] * 3
