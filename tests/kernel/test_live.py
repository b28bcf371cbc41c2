"""`store.live`: snapshots of memory in use, and what becomes of those that do not come to an end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import mmap
import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kinds import HUGE, poke
from pattern import PAGE, content
from processes import PATIENCE, kill
from scenario import play, replaced

import aiouffd
from aiouffd.kernel import libc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PAGES = 256
SIZE = PAGES * PAGE


def served(*, shared: bool = False, **options: Any) -> aiouffd.Monitor:
    """Return a Monitor of pages that can be told, all of which were written."""
    return aiouffd.Monitor(aiouffd.Region(SIZE, shared=shared), aiouffd.BufferSource(content(0, SIZE)), **options)


def protected(monitor: aiouffd.Monitor) -> int:
    """Write to each page, and return to how many of them that was told of."""
    before = monitor.statistics().write_faults
    for at in range(0, SIZE, PAGE):
        poke(monitor.region.address + at + 32, b"w")
    return monitor.statistics().write_faults - before


def slow(monitor: aiouffd.Monitor, place: Path) -> asyncio.Task[Any]:
    """Begin a snapshot that takes minutes."""
    return asyncio.get_running_loop().create_task(monitor.snapshot(place, rate=SIZE / 100))


async def begun(monitor: aiouffd.Monitor, at: int = SIZE - 100) -> None:
    """Wait until a snapshot is under way: a write is told of."""
    before = monitor.statistics().write_faults
    while monitor.statistics().write_faults == before:
        await asyncio.to_thread(poke, monitor.region.address + at, b"x")
        await asyncio.sleep(0.001)


async def ended(engine: str, folder: str) -> None:
    """Scenario: snapshots that are canceled, refused, or overtaken by the end."""
    place = Path(folder)
    choice: Any = getattr(aiouffd, engine)()
    monitor = await asyncio.to_thread(served, engine=choice)
    async with monitor:
        await monitor.prefetch(0, SIZE)
        both = [slow(monitor, place / name) for name in ("x.snap", "plain")]  # nothing is ready for any yet
        refused, left = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(aiouffd.BusyError, match="a snapshot"):
            refused.pop().result()
        left.pop().cancel()
        await asyncio.wait(both)
        for name in ("x.snap", "plain"):
            task = slow(monitor, place / name)
            await begun(monitor)
            with pytest.raises(aiouffd.BusyError, match="a snapshot"):
                await monitor.snapshot(place / "other.snap")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not await asyncio.to_thread(protected, monitor)
            assert not list(place.glob("*.snap"))
            assert not list(place.glob("plain*"))
        await monitor.snapshot(place / "first.snap")
        assert await asyncio.to_thread(protected, monitor) == PAGES

        def take_while_it_changes() -> None:
            with monitor.no_snapshot(), ThreadPoolExecutor(1) as other, pytest.raises(aiouffd.BusyError):
                other.submit(monitor.snapshot_sync, place / "second.snap").result()

        await asyncio.to_thread(take_while_it_changes)
        with pytest.raises(aiouffd.StoreError, match="of that name already"):
            await monitor.snapshot(place / "first.snap")
        with pytest.raises(aiouffd.StoreError, match="in the store of its layer"):
            await monitor.snapshot(place / "other" / "x.snap", base=place / "first.snap")
        assert await asyncio.to_thread(protected, monitor) == PAGES  # what was written since the base stays known
        task = slow(monitor, place / "plain")
        await begun(monitor)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await asyncio.to_thread(protected, monitor)  # else what has failed protects nothing
        task = slow(monitor, place / "left.snap")
        await begun(monitor)
    with pytest.raises(aiouffd.ClosedError):
        await task
    assert [path.name for path in place.glob("*.snap")] == ["first.snap"]


@pytest.mark.parametrize("engine", ["Pager", "InThread"])
def test_a_snapshot_that_does_not_come_to_its_end(engine: str, tmp_path: Path) -> None:
    """It leaves neither a file nor a protection; each reason is an error of its own."""
    play(ended, engine, str(tmp_path))


asked = threading.Event()


class Hanging(aiouffd.FileSource):
    """Gives nothing."""

    async def read(self, offset: int, length: int) -> bytearray:
        """Never return."""
        asked.set()
        await asyncio.Event().wait()
        return bytearray(length)


async def let_go(engine: str, folder: str) -> None:
    """Scenario: behind a snapshot that was canceled, early or late, a file that is written to is free at once."""
    gc.disable()
    path = Path(folder, "file")
    path.write_bytes(content(0, SIZE))
    async with getattr(aiouffd, engine)() if engine == "Pager" else contextlib.nullcontext() as shared:
        for early in (True, False, True, False):
            source = await asyncio.to_thread(aiouffd.FileSource, path, writable=True)
            async with aiouffd.open(source, write_back=True, engine=shared or aiouffd.InThread()) as region:
                await asyncio.to_thread(poke, region.address + SIZE - 100, b"x")
                task = slow(region.monitor, Path(folder, "x.snap"))
                await (asyncio.sleep(0) if early else begun(region.monitor))
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                assert task.cancelled()
            del source, region, task
    if shared is None:
        source = await asyncio.to_thread(Hanging, path, writable=True)
        async with aiouffd.open(source, write_back=True, engine=aiouffd.InThread()) as region:
            task = asyncio.create_task(region.monitor.snapshot(Path(folder, "x.snap")))
            assert await asyncio.to_thread(asked.wait, 60)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        del source, region, task
        await asyncio.to_thread(aiouffd.FileSource, path, writable=True)


@pytest.mark.parametrize("engine", ["Pager", "InThread"])
def test_what_a_canceled_snapshot_keeps(engine: str, tmp_path: Path) -> None:
    """Nothing: no error and no frame of it has the source of a Monitor that was left. One that begins hears it, too."""
    play(let_go, engine, str(tmp_path))


class Refusing:
    """A source of one's own, which gives nothing."""

    size = SIZE

    def __init__(self, path: Path, *, writable: bool) -> None:
        self._file = aiouffd.FileSource(path, writable=writable)

    async def read(self, offset: int, length: int) -> bytearray:
        """Fail, for good."""
        raise aiouffd.SourceError(repr(self), offset, length, "it has nothing")

    async def write(self, _offset: int, _data: memoryview) -> None:
        """Fail, for good."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Full(Refusing):
    """Takes nothing."""

    async def read(self, _offset: int, length: int) -> bytearray:
        """Give zeros."""
        return bytearray(length)


def in_both_ways(ask: str, *arguments: Any, **options: Any) -> list[Callable[[aiouffd.Monitor], Awaitable[Any]]]:
    """Return what asks something of a Monitor, on the loop and in a thread."""
    return [
        lambda monitor: getattr(monitor, ask)(*arguments, **options),
        lambda monitor: asyncio.to_thread(getattr(monitor, f"{ask}_sync"), *arguments, **options),
    ]


def when_free(kind: Any, path: Path) -> Any:
    """Return a source that writes to a file: a thread that has just failed lets go of it a moment later."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return kind(path, writable=True)
        except aiouffd.BusyError:
            if time.monotonic() > end:
                raise
            time.sleep(0.001)


async def let_go_of_failed(engine: str, folder: str) -> None:
    """Scenario: behind what has failed, and a snapshot that the Monitor was left in, the file is free at once."""
    gc.disable()
    place, path = Path(folder), Path(folder, "file")
    path.write_bytes(content(0, SIZE))
    place.joinpath("packs").touch()  # where a folder would be made
    place.joinpath("plain").mkdir()
    not_written = in_both_ways("snapshot", place / "x.snap") + in_both_ways("snapshot", place / "plain")
    not_read = in_both_ways("prefetch", 0, SIZE) + in_both_ways("prefetch", 0, SIZE, progress=lambda _: None)
    tries: list[tuple[Any, Any]] = [(aiouffd.FileSource, ask) for ask in [*not_written, None]]
    if engine != "Pager":  # which has a copy of it
        tries += [(Refusing, ask) for ask in not_written + not_read]
        tries += [(Full, ask) for ask in in_both_ways("flush")]
    async with getattr(aiouffd, engine)() if engine == "Pager" else contextlib.nullcontext() as shared:
        for kind, ask in tries:
            source, left = await asyncio.to_thread(when_free, kind, path), None
            with contextlib.suppress(aiouffd.WriteBackError):
                async with aiouffd.open(source, write_back=True, engine=shared or getattr(aiouffd, engine)()) as region:
                    if kind is not Refusing:
                        await asyncio.to_thread(poke, region.address + SIZE - 100, b"x")
                    if ask is None:
                        left = slow(region.monitor, place / "y" / "x.snap")
                        await begun(region.monitor)
                    else:
                        with pytest.raises(aiouffd.UffdError):
                            await ask(region.monitor)
            if left is not None:
                with pytest.raises(aiouffd.ClosedError):
                    await left
            del source, region, left
        await asyncio.to_thread(when_free, aiouffd.FileSource, path)


@pytest.mark.parametrize("engine", ["Pager", "InThread", "InProcess"])
def test_what_a_failed_snapshot_keeps(engine: str, tmp_path: Path) -> None:
    """Nothing either, nor does another request that fails: else the next block with the file finds it in use."""
    play(let_go_of_failed, engine, str(tmp_path))


async def overtaken(engine: str, folder: str) -> None:
    """Scenario: the layout changes during a snapshot, through the region and without its knowledge."""
    place = Path(folder)
    choice: Any = getattr(aiouffd, engine)()
    async with await asyncio.to_thread(served, engine=choice) as monitor:
        region = monitor.region
        await monitor.prefetch(0, SIZE)
        task = asyncio.create_task(monitor.snapshot(place / "plain", rate=4 * SIZE))
        await begun(monitor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            await asyncio.to_thread(region.madvise, mmap.MADV_DONTNEED, 0, 8 * PAGE)
        assert (await task).bytes
        assert (place / "plain").read_bytes()[: SIZE - PAGE] == content(0, SIZE - PAGE)
        assert region[: 8 * PAGE] == bytes(8 * PAGE)
        if engine == "InThread":  # without the kernel's events nobody hears of what follows
            return
        for name in "x.snap", "other":
            task = slow(monitor, place / name)
            await begun(monitor)
            await asyncio.to_thread(libc.madvise, region.address + 16 * PAGE, PAGE, mmap.MADV_DONTNEED)
            with pytest.raises(aiouffd.LayoutChangingError, match="a snapshot"):
                await task
            await asyncio.to_thread(poke, region.address + 16 * PAGE, b"there again")
        assert not await asyncio.to_thread(protected, monitor)
        for victims in (1, 0), (1,), (0,), (0, 1):
            task = slow(monitor, place / "x.snap")
            await begun(monitor)
            pids = [monitor.pids[at] for at in victims]
            for pid in pids:
                kill(pid)
            await asyncio.to_thread(protected, monitor)  # nobody hangs
            with pytest.raises(aiouffd.PagerDiedError, match="while it took a snapshot"):
                await task
            await asyncio.to_thread(replaced, monitor, *pids)
        assert not list(place.glob("*.snap"))
        await monitor.snapshot(place / "x.snap")
        with aiouffd.open(place / "x.snap") as found:
            assert found[:] == region[:]


@pytest.mark.parametrize("engine", ["Pager", "InThread"])
def test_a_snapshot_that_is_overtaken(engine: str, tmp_path: Path) -> None:
    """The region's own methods wait for it; what is emptied behind its back, or kills the pager, ends it by name."""
    play(overtaken, engine, str(tmp_path))


def of_kinds(folder: str) -> None:
    """Scenario: huge pages, transparent ones, and memory that forked children write to as well."""
    place, model = Path(folder), bytearray(content(0, 4 * HUGE))
    source = aiouffd.BufferSource(bytes(model))
    with contextlib.suppress(aiouffd.UnsupportedError):  # this machine has no huge pages
        region = aiouffd.Region(4 * HUGE, page_size=HUGE)
        with aiouffd.Monitor(region, source) as monitor:
            for base in (None, place / "huge1.snap"):
                region[HUGE + 5] = model[HUGE + 5] = region[HUGE + 5] ^ 1
                result = monitor.snapshot_sync(place / f"huge{1 if base is None else 2}.snap", base)
            assert result.bytes == HUGE
            monitor.snapshot_sync(place / "huge")
        region.close()
        with aiouffd.open(place / "huge2.snap") as found:
            assert found[:] == model == (place / "huge").read_bytes()
    model = bytearray(4 * HUGE)
    region = aiouffd.Region(4 * HUGE)
    libc.madvise(region.address, 4 * HUGE, mmap.MADV_HUGEPAGE)
    model[: 2 * HUGE] = region[: 2 * HUGE] = b"t" * 2 * HUGE
    with aiouffd.Monitor(region) as monitor:
        for name in ("one", "other"):
            monitor.snapshot_sync(place / f"{name}.snap", None if name == "one" else place / "one.snap")
            with aiouffd.open(place / f"{name}.snap") as found:
                assert found[:] == model
            region[HUGE + 5] = model[HUGE + 5] = 7
    region = aiouffd.Region(SIZE, shared=True)
    with aiouffd.Monitor(region, source, fork="serve") as monitor:
        model = bytearray(content(0, SIZE))

        def write(page: int, value: int) -> None:
            """Write to a page in a forked child, at the end of which all of its faults were served."""
            model[page * PAGE] = value
            if (child := os.fork()) == 0:
                poke(region.address + page * PAGE, bytes([value]))
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0

        for number, base in enumerate((None, place / "fork0.snap", place / "fork1.snap")):
            write(number, number)
            write(9, number)
            monitor.snapshot_sync(place / f"fork{number}.snap", base)
            with aiouffd.open(place / f"fork{number}.snap") as found:
                assert found[:] == model


def test_each_kind_of_memory(tmp_path: Path) -> None:
    """What is written to huge pages, and by forked children to shared memory, is in the next layer."""
    play(of_kinds, str(tmp_path))


def laid_out_anew(engine: str, folder: str) -> None:
    """Scenario: between layers the region is emptied, grows and shrinks; its source is shorter than it is."""
    warnings.simplefilter("ignore", RuntimeWarning)
    region, number = aiouffd.Region(SIZE + 123), 0
    choice: Any = getattr(aiouffd, engine)()
    with aiouffd.Monitor(region, aiouffd.BufferSource(content(0, SIZE - 77)), engine=choice, readahead=0) as monitor:

        def check() -> None:
            nonlocal number
            place = Path(folder) / f"{number}.snap"
            monitor.snapshot_sync(place, place.with_name(f"{number - 1}.snap") if number else None)
            number += 1
            with aiouffd.open(place) as found:
                assert found[:] == region[:], number

        region[5 * PAGE] = 1
        check()
        region.madvise(mmap.MADV_DONTNEED, 5 * PAGE, 40 * PAGE)
        region[SIZE + 122] = 2
        check()
        region.resize(SIZE + 64 * PAGE)
        region[SIZE + 3 * PAGE] = region[6 * PAGE] = 3
        check()
        region[SIZE + 4 * PAGE] = region[7 * PAGE] = 4
        check()
        region.resize(SIZE // 2 + 100)
        check()
        region[8 * PAGE] = 5
        check()


@pytest.mark.parametrize("engine", ["Pager", "InThread"])
def test_layers_of_a_region_that_changes(engine: str, tmp_path: Path) -> None:
    """Each shows what the region shows."""
    play(laid_out_anew, engine, str(tmp_path))


class Half:
    """Has the first half of what it says that it has."""

    size = SIZE
    retries = 0

    async def read(self, offset: int, length: int) -> Any:
        """Return bytes of the first half."""
        if offset + length > SIZE // 2:
            raise aiouffd.SourceError("Half", offset, length, "half of it is gone")
        return content(offset, length)


async def around_other_memory(engine: str, folder: str) -> None:
    """Scenario: a part of the region is unmapped behind its back, and another mapping is there."""
    monitor = await asyncio.to_thread(served, engine=getattr(aiouffd, engine)(), readahead=0)
    async with monitor:
        other = monitor.region.address + 64 * PAGE
        libc.munmap(other - PAGE, 66 * PAGE)
        libc.mmap_fixed(other, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in (16, 200):
            assert await asyncio.to_thread(monitor.read, at * PAGE, PAGE) == content(at * PAGE, PAGE)
            await monitor.snapshot(Path(folder) / f"{at}.snap")
            assert await asyncio.to_thread(ctypes.string_at, other + at * PAGE // 4, PAGE) == bytes(PAGE)
        writes = monitor.statistics().write_faults
        await asyncio.to_thread(poke, monitor.region.address + 16 * PAGE, b"x")  # what is the region's is protected
        assert monitor.statistics().write_faults == writes + 1
    os._exit(0)  # as any program may: it has a hole in its region


@pytest.mark.parametrize("engine", ["InThread", "InProcess"])
def test_memory_in_a_hole_of_a_region_stays_what_it_is(engine: str, tmp_path: Path) -> None:
    """A snapshot registers no page of it: a missing one would show the source's bytes."""
    play(around_other_memory, engine, str(tmp_path))


async def on_this_loop(folder: str) -> None:
    """Scenario: the caller's loop serves; the source fails, until what it lacks was written."""
    warnings.simplefilter("ignore", RuntimeWarning)
    place, late = Path(folder), SIZE // 2 - 100  # not read soon: a page that was read is protected no longer
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Half(), engine=aiouffd.InProcess(), readahead=0) as monitor:
        with pytest.raises(aiouffd.SourceError, match="half of it is gone"):
            await monitor.snapshot(place / "x.snap")
        with pytest.raises(RuntimeError, match="await"):
            monitor.snapshot_sync(place / "x.snap")
        await asyncio.to_thread(poke, region.address + late, b"x")  # what comes behind the moment is not protected
        task = slow(monitor, place / "x.snap")
        await begun(monitor, late)
        with pytest.raises(aiouffd.BusyError):
            region.madvise(mmap.MADV_DONTNEED, 0, PAGE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        region.madvise(mmap.MADV_DONTNEED, SIZE // 2, SIZE // 2)  # zeros, and not the source's
        await monitor.snapshot(place / "x.snap")
        await monitor.snapshot(place / "plain")
    data = (place / "plain").read_bytes()
    assert data == content(0, late) + b"x" + content(late + 1, 99) + bytes(SIZE // 2)
    with await asyncio.to_thread(aiouffd.open, place / "x.snap") as found:
        assert await asyncio.to_thread(found.read, SIZE) == data


def test_the_callers_loop_takes_a_snapshot(tmp_path: Path) -> None:
    """Its own thread cannot wait for one; what the source does not give ends it by name."""
    play(on_this_loop, str(tmp_path))
