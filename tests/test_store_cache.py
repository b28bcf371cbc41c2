"""`store.cache`: chunks that are kept for all processes of a user, or are not there."""

from __future__ import annotations

import errno
import gc
import logging
import os
import pickle
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from aiouffd.store.cache import SMALLEST, ChunkCache
from aiouffd.store.codecs import digest

MIB = 1 << 20
DATA = {digest(b"%d" % n): bytes([n + 1]) * 65536 for n in range(10)}


def segment_of(path: Path) -> Path:
    """Return the one segment."""
    (found,) = path.glob("*.segment")
    return found


@pytest.fixture
def cache(tmp_path: Path) -> ChunkCache:
    """Return one with some chunks."""
    made = ChunkCache(tmp_path / "a" / "cache", 64 * MIB)
    places = made.add(list(DATA.items()))
    assert None not in places
    return made


def test_other_processes_find_what_was_added(cache: ChunkCache) -> None:
    """And nothing else; all of it private."""
    other = ChunkCache(cache.path, 64 * MIB)
    for key, data in DATA.items():
        found = other.find(key)
        assert found is not None
        assert found.data == data
        assert other.peek([key]) == [found.place]
    assert other.find(digest(b"else")) is None
    else_ = digest(b"else")
    assert other.peek([else_, *DATA, else_]) == [None, *(other.peek([key])[0] for key in DATA), None]
    assert None not in other.peek(list(DATA))
    assert ChunkCache(cache.path, 64 * MIB).peek([key]) == [None]  # it is not open
    folder = Path(cache.path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_zeros_take_no_room(tmp_path: Path) -> None:
    """They are known to be zeros."""
    cache = ChunkCache(tmp_path / "cache", 64 * MIB)
    key = digest(b"zeros")
    assert cache.add([(key, bytes(65536))])[0] == (None, 0, 65536)
    assert not list((tmp_path / "cache").glob("*.segment"))
    found, at_hand = cache.find(key), cache.peek([key, key])
    assert (found, at_hand) == (((None, 0, 65536), None), [(None, 0, 65536)] * 2)
    assert cache.add([(digest(b"no zeros"), bytes(65535) + b"1")])[0] != (None, 0, 65536)


@pytest.mark.parametrize("bit", [0, 3, 7])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_a_flipped_bit_is_noticed_and_forgotten(cache: ChunkCache, bit: int, place: float) -> None:
    """Wherever it is in a chunk; the others are as they were."""
    key = list(DATA)[4]
    found = cache.find(key)
    assert found is not None
    with segment_of(Path(cache.path)).open("r+b") as file:
        file.seek(found.place.offset + int(place * 65536))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit]))
    other = ChunkCache(cache.path, 64 * MIB)
    beside = other.find(next(iter(DATA)))
    assert beside is not None  # and its segment stays open
    assert [place is not None for place in other.peek(list(DATA))] == [name != key for name in DATA]
    assert other.find(key) is None
    assert [other.find(name) is not None for name in DATA] == [name != key for name in DATA]
    assert other.statistics()["damaged"] == 1
    other.add([(key, DATA[key])])
    assert cache.find(key) is not None


def test_a_segment_that_was_cut(cache: ChunkCache) -> None:
    """What is behind its end is not there; nor is what a lost segment held."""
    keys = list(DATA)
    found = cache.find(keys[4])
    assert found is not None
    os.truncate(segment_of(Path(cache.path)), found.place.offset + 5)
    other = ChunkCache(cache.path, 64 * MIB)
    assert [other.find(key) is not None for key in keys] == [number < 4 for number in range(10)]
    segment_of(Path(cache.path)).unlink()
    assert ChunkCache(cache.path, 64 * MIB).find(keys[0]) is None


def test_verify_trim_and_counters(cache: ChunkCache) -> None:
    """What an operator asks."""
    assert cache.verify() == (10, 0)
    with segment_of(Path(cache.path)).open("r+b") as file:
        file.seek(5 * 65536)
        file.write(b"damaged")
    assert cache.verify() == (10, 1)
    assert cache.verify() == (9, 0)
    cache.count(hits=3, waits=1)
    other = ChunkCache(cache.path, 64 * MIB)
    other.count(hits=4)
    assert cache.statistics()["hits"] == 3
    assert other.statistics() == {
        "hits": 7,
        "misses": 0,
        "bytes": 0,
        "evictions": 0,
        "waits": 1,
        "damaged": 1,
        "segments": 1,
        "chunks": 9,
        "bytes_held": cache.statistics()["bytes_held"],
    }
    assert cache.trim(64 * MIB) == 0
    assert cache.trim(0) == 1
    assert cache.statistics()["chunks"] == 0
    assert cache.statistics()["evictions"] == 1


def test_whose_folder_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others must not enter it, nor own it; and it must be one."""
    (tmp_path / "open").mkdir(0o755)
    with pytest.raises(PermissionError, match="others may enter"):
        ChunkCache(tmp_path / "open", 64 * MIB).check()
    (tmp_path / "mine").mkdir(0o700)
    ChunkCache(tmp_path / "mine", 64 * MIB).check()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to one user"):
        ChunkCache(tmp_path / "mine", 64 * MIB).check()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        ChunkCache(tmp_path / "file", 64 * MIB).check()
    with pytest.raises(ValueError, match="at least 8388608"):
        ChunkCache(tmp_path / "small", SMALLEST - 1)


def test_a_folder_that_others_may_enter_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also if that has changed since: said once."""
    (tmp_path / "open").mkdir(0o755)
    cache = ChunkCache(tmp_path / "open", 64 * MIB)
    for _ in range(3):
        assert cache.add(list(DATA.items())) == [None] * 10
        assert cache.find(next(iter(DATA))) is None
    (record,) = caplog.records
    assert "cannot be used: others may enter this folder: a cache has mode 0700; sources are" in record.getMessage()
    assert not list((tmp_path / "open").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails(
    cache: ChunkCache, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is served without; said once; tried again later, and said anew when it fails again."""
    moment = [1000.0]
    monkeypatch.setattr("aiouffd.store.cache.time.monotonic", lambda: moment[0])
    more = [(digest(b"more"), b"more" * 16384)]
    real = os.pwrite

    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    assert cache.add(more) == [None]
    assert [cache.usable] == [False]
    assert cache.add(more) == [None]
    monkeypatch.setattr(os, "pwrite", real)
    assert cache.add(more) == [None]
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert os.strerror(number) in caplog.text
    found = cache.find(next(iter(DATA)))
    assert (found is not None) == (number == errno.ENOSPC)  # nothing can be added, but all can be read
    moment[0] += 31
    assert cache.usable
    assert cache.find(next(iter(DATA))) is not None
    assert cache.add(more) != [None]
    assert cache.find(more[0][0]) is not None


def test_a_folder_that_vanishes(cache: ChunkCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is open stays open; a new one is made where it was."""
    moment = [1000.0]
    monkeypatch.setattr("aiouffd.store.cache.time.monotonic", lambda: moment[0])
    found = cache.find(next(iter(DATA)))
    Path(cache.path).rename(Path(cache.path).with_name("moved"))
    for path in Path(cache.path).with_name("moved").iterdir():
        path.unlink()
    Path(cache.path).with_name("moved").rmdir()
    assert found is not None
    assert found.place.segment is not None
    assert found.place.segment.read(found.place.offset, 65536) == found.data
    assert cache.add([(digest(b"more"), b"more" * 16384)]) == [None]
    moment[0] += 31
    assert cache.add([(digest(b"more"), b"more" * 16384)]) != [None]
    assert Path(cache.path).is_dir()


def test_who_keeps_it_locked_is_not_waited_for_forever(cache: ChunkCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped there."""
    other = ChunkCache(cache.path, 64 * MIB)
    assert other.find(next(iter(DATA))) is not None
    assert other._opened is not None
    monkeypatch.setattr("aiouffd.store.cache_files._PATIENCE", 0.01)
    with other._opened.exclusive():
        cache.add([(digest(b"more"), b"more" * 16384)])
        assert not cache.usable
    assert other.find(digest(b"more")) is None  # it was written, but is not in the index
    with pytest.raises(ZeroDivisionError), other._opened.exclusive(), other._opened.exclusive():
        _ = 1 // 0
    assert ChunkCache(cache.path, 64 * MIB).add([(digest(b"more"), b"more" * 16384)]) != [None]


def test_locks_of_keys(cache: ChunkCache) -> None:
    """One of several processes has one; without a cache there are none."""
    key = next(iter(DATA))
    other = ChunkCache(cache.path, 64 * MIB)
    assert cache.try_lock(key)
    assert other.try_lock(key) is False
    cache.unlock(key)
    assert other.try_lock(key)
    other.unlock(key)
    assert cache.try_lock(key)
    cache.close()  # and opened anew
    assert cache.try_lock(key) is False
    cache.unlock(key)
    assert other.try_lock(key)
    other.unlock(key)
    missing = ChunkCache("/proc/self/no-such-folder", 64 * MIB)
    assert missing.try_lock(key) is None
    missing.unlock(key)


def test_forked_children_keep_no_locks(cache: ChunkCache) -> None:
    """A fetcher that is killed is replaced, though its child lives; the child opens the cache anew."""
    key = next(iter(DATA))
    assert cache.try_lock(key)
    reading, writing = os.pipe()
    ending, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        found = cache.find(key)
        os.write(writing, b"1" if found is not None and cache.try_lock(key) is False else b"0")
        os.read(ending, 1)
        os._exit(0)
    assert os.read(reading, 1) == b"1"
    other = ChunkCache(cache.path, 64 * MIB)
    assert other.try_lock(key) is False
    cache._locked.clear()  # as if it had been killed: nobody unlocks, and its descriptors are closed
    cache.close()
    gc.collect()
    assert other.try_lock(key)
    os.write(end, b"x")
    os.waitpid(pid, 0)
    for fd in (reading, writing, ending, end):
        os.close(fd)


def test_several_threads_and_limits(tmp_path: Path) -> None:
    """Nothing is lost, and the limit holds, while caches with other limits add to the same folder."""
    caches = [ChunkCache(tmp_path / "cache", size * MIB) for size in (8, 9, 64)]
    lost: list[bytes] = []

    def work(cache: ChunkCache, first: int) -> None:
        for number in range(first, first + 60):
            key, data = digest(b"%d" % number), b"%08d" % number * 8192
            cache.add([(key, data)])
            found = cache.find(key)
            if found is None or found.data != data:
                lost.append(key)

    threads = [threading.Thread(target=work, args=(cache, n * 1000)) for n, cache in enumerate(caches[:2] * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lost) < 60  # another may have evicted it by then
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.segment")) <= 9 * MIB
    assert caches[0].verify()[1] == 0
    work(caches[2], 9000)
    assert caches[0].statistics()["damaged"] == 0


def test_a_larger_index_takes_the_place_of_a_smaller(tmp_path: Path) -> None:
    """Those who have the small one go over to it."""
    small = ChunkCache(tmp_path / "cache", 8 * MIB)
    small.add(list(DATA.items()))
    large = ChunkCache(tmp_path / "cache", 1 << 30)
    assert large.find(next(iter(DATA))) is None
    small.add([(digest(b"lost"), b"lost" * 100)])  # to the one that nobody sees; then it is noticed
    small.add([(digest(b"more"), b"more" * 100)])
    assert large.find(digest(b"more")) is not None


def test_it_is_pickled_as_its_path(cache: ChunkCache) -> None:
    """And works where it arrives."""
    again = pickle.loads(pickle.dumps(cache))
    assert (again.path, again.max_bytes) == (cache.path, cache.max_bytes)
    assert again.find(next(iter(DATA))) is not None
    with pytest.raises(TypeError, match="max_bytes= takes a whole number of bytes"):
        ChunkCache(cache.path, "50G")  # type: ignore[arg-type]
