"""Programs that change the memory of a process at random, held against a plain model of what each byte must be.

A program is a short Python text: statements on a `Machine` and on `Piece`s of its memory. It can be pasted into a file
and run with this directory in PYTHONPATH. `programs` makes them of what hypothesis draws.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, Self

from hosts import Control, EngineName, Host, Told
from pattern import PAGE, content, peek

import aiouffd
from aiouffd.kernel import libc

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

__all__ = ["SLOT", "SLOTS", "TAIL", "Machine", "Piece", "name_of"]

SLOT = 128
"""Pages of a place to move to, more than a piece ever has."""
SLOTS = 512
TAIL = 64
"""Pages that a shared region's file has behind the region: what it grows into."""


def name_of(number: int) -> str:
    """Return what a program calls its piece of that number: a, b, ... z, aa, ..."""
    text = ""
    while number >= 0:
        text = chr(ord("a") + number % 26) + text
        number = number // 26 - 1
    return text if text not in ("m", "as", "if", "in", "is", "or") else f"{text}_"


class Cell:
    """What one page holds: private memory has a cell for each page, and a page of a file one for all its mappings."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.written = False  # since writes were last collected


class Piece:
    """A run of addresses, some of its pages unmapped (None) by now; each method does what its system call does."""

    def __init__(self, machine: Machine, address: int, cells: Sequence[Cell | None]) -> None:
        self._machine = machine
        self._name = name_of(len(machine.pieces))
        self._address = address
        self._cells = list(cells)
        machine.pieces.append(self)

    def _at(self, page: int) -> int:
        return self._address + page * PAGE

    def _take(self, first: int, count: int) -> list[Cell]:
        """Return the cells of a range, which is unmapped from now on."""
        cells = [cell for cell in self._cells[first : first + count] if cell is not None]
        assert len(cells) == count, "the program uses what it has unmapped"
        self._cells[first : first + count] = [None] * count
        return cells

    def touch(self, page: int) -> None:
        """Read all of a page, with the GIL held where that does not stop the loop that serves it."""
        read = peek if self._machine.host.engine == "in_process" else ctypes.string_at
        self._compare(page, read(self._at(page), PAGE))

    def write(self, page: int, value: int) -> None:
        """Write some bytes into a page."""
        cell = self._cells[page]
        assert cell is not None
        at = value * 16 % PAGE
        ctypes.memset(self._at(page) + at, value, 16)
        cell.data = cell.data[:at] + bytes([value]) * 16 + cell.data[at + 16 :]
        cell.written = True

    def remove(self, first: int, count: int) -> None:
        """Empty pages: MADV_DONTNEED, or MADV_REMOVE where memory is shared."""
        advice = mmap.MADV_REMOVE if self._machine.shared else mmap.MADV_DONTNEED
        if self._machine.host.local:  # its own methods are how an engine in this process learns of a change
            self._machine.host.monitor.region.madvise(advice, first * PAGE, count * PAGE)
        else:
            libc.madvise(self._at(first), count * PAGE, advice)
        for cell in self._cells[first : first + count]:
            assert cell is not None
            cell.data, cell.written = bytes(PAGE), False

    def unmap(self, first: int, count: int) -> None:
        """munmap(2)."""
        libc.munmap(self._at(first), count * PAGE)
        self._take(first, count)

    def replace(self, first: int, count: int) -> None:
        """Map fresh memory over pages, which unmaps them."""
        libc.mmap_fixed(self._at(first), count * PAGE)
        self._take(first, count)
        self._cells[first : first + count] = [Cell(bytes(PAGE)) for _ in range(count)]

    def move(self, first: int, count: int, to: int = 0) -> Piece:
        """Move pages to where nothing is, and let them grow to `to` pages."""
        to = to or count
        place = self._machine.place()
        moved = libc.mremap(self._at(first), count * PAGE, to * PAGE, libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED, place)
        assert moved == place
        return self._moved(place, self._grown(first, count, to))

    def grow(self, first: int, count: int, to: int) -> Piece:
        """Let pages grow to `to` pages, in place or elsewhere, as the kernel likes."""
        place = libc.mremap(self._at(first), count * PAGE, to * PAGE, libc.MREMAP_MAYMOVE)
        return self._moved(place, self._grown(first, count, to))

    def shrink(self, first: int, count: int, to: int) -> None:
        """Let pages shrink to the first `to` of them, in place."""
        assert libc.mremap(self._at(first), count * PAGE, to * PAGE, 0) == self._at(first)
        self._take(first + to, count - to)

    def onto(self, first: int, count: int, other: Piece, at: int) -> Piece:
        """Move pages over others, which unmaps those."""
        place = other._at(at)
        flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED
        assert libc.mremap(self._at(first), count * PAGE, count * PAGE, flags, place) == place
        other._take(at, count)
        return self._moved(place, self._take(first, count))

    def leave(self, first: int, count: int) -> Piece:
        """Move pages away and leave empty ones (MREMAP_DONTUNMAP)."""
        place = self._machine.place()
        flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED | libc.MREMAP_DONTUNMAP
        assert libc.mremap(self._at(first), count * PAGE, count * PAGE, flags, place) == place
        cells = self._take(first, count)
        self._cells[first : first + count] = [Cell(bytes(PAGE)) for _ in range(count)]
        return self._moved(place, cells)

    def _grown(self, first: int, count: int, to: int) -> list[Cell]:
        cells = self._take(first, count)
        if not self._machine.shared:
            return cells + [Cell(bytes(PAGE)) for _ in range(to - count)]
        last = self._machine.file.index(cells[-1])  # a file goes on with its next pages
        return cells + self._machine.file[last + 1 : last + 1 + to - count]

    def _moved(self, address: int, cells: list[Cell]) -> Piece:
        return Piece(self._machine, address, cells)

    def _compare(self, page: int, found: bytes) -> None:
        cell = self._cells[page]
        assert cell is not None, "the program touches what it has unmapped"
        if found != cell.data:
            at = next(at for at in range(PAGE) if found[at] != cell.data[at])
            raise AssertionError(
                f"page {page} of {self._name} at {self._at(page):#x}, byte {at}: the memory holds"
                f" {found[at : at + 8].hex()}, the model {cell.data[at : at + 8].hex()}"
            )


class Machine:
    """A process whose memory is served by a pager, beside the model of it.

    Args:
        pages: of the region.
        source_pages: of the source; what the region has beyond is zeros.
        shared: memory of a memfd, which forked children write to as well; the parent waits for each of them.
        source: "hand" (read_nowait), "far" (a task for each read) or "buffer" (copied right out of memory).
        readahead: the Monitor's.
        lies: a page of which the source gives a wrong byte.
        hangs: a page that the source never gives.
        engine: who serves it. What runs in this process takes no raw changes of the layout, and no forks.
        background: all is brought in the background.
        tracked: the kernel tracks writes.
    """

    def __init__(
        self,
        pages: int,
        source_pages: int | None = None,
        *,
        shared: bool = False,
        source: Literal["hand", "far", "buffer"] = "hand",
        readahead: int = 2 << 20,
        lies: int = -1,
        hangs: int = -1,
        engine: EngineName = "pager",
        background: bool = False,
        tracked: bool = False,
    ) -> None:
        self.shared = shared
        self.pieces: list[Piece] = []
        size = min(pages if source_pages is None else source_pages, pages)
        self.file = [Cell(content(at * PAGE, PAGE) if at < size else bytes(PAGE)) for at in range(pages)]
        if shared:
            self.file += [Cell(bytes(PAGE)) for _ in range(TAIL)]
        self._region = aiouffd.Region(pages * PAGE, shared=shared)
        if shared:
            os.ftruncate(self._region.fd, (pages + TAIL) * PAGE)
        self._control = Control.fresh()
        told = Told(size, 0.0002 if source == "far" else None, lies, hangs, self._control)
        self.host = Host(
            engine,
            self._region,
            aiouffd.BufferSource(told.bytes_of(0, size * PAGE)) if source == "buffer" else told,
            readahead=readahead,
            timeout=None,
            background=background,
            track_writes=tracked,
            on_exit="populate",
        )
        self._monitor = self.host.monitor
        self._canceled = 0
        self._resized = False
        # Where to move to: reserved, so that nothing else comes to lie there.
        self._arena = mmap.mmap(-1, SLOTS * SLOT * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
        self._arena_address = self._address_of_arena()
        self._slots = 0
        self._owner = os.getpid()
        self._children: list[tuple[int, int]] = []
        self._report = -1
        self.region = Piece(self, self._region.address, self.file[:pages])

    def _address_of_arena(self) -> int:
        length = SLOTS * SLOT * PAGE
        for line in Path("/proc/self/maps").read_text().splitlines():
            low, high = (int(number, 16) for number in line.split()[0].split("-"))
            if line.split()[1].startswith("---") and high - low >= length:
                return high - length
        raise AssertionError("the arena is not mapped")

    def place(self) -> int:
        """Return an address that nothing has been moved to yet."""
        self._slots += 1
        return self._arena_address + (self._slots - 1) * SLOT * PAGE

    # Statements

    def check(self) -> None:
        """Compare every byte that is mapped."""
        for piece in self.pieces:
            for page, cell in enumerate(piece._cells):
                if cell is not None:
                    piece.touch(page)

    def storm(self, threads: int) -> None:
        """Touch every page from several threads without the GIL, each beginning elsewhere; compare."""
        pages = [(piece, page) for piece in self.pieces for page, cell in enumerate(piece._cells) if cell is not None]
        found: list[tuple[Piece, int, bytes]] = []

        def touch(number: int) -> None:
            begin = number * len(pages) // threads
            for piece, page in pages[begin:] + pages[:begin]:
                found.append((piece, page, peek(piece._at(page), PAGE)))

        workers = [threading.Thread(target=touch, args=(number,), daemon=True) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for piece, page, data in found:
            piece._compare(page, data)

    def prefetch(self, first: int, count: int) -> None:
        """Bring pages of the region's first layout, wherever they are now."""
        self._monitor.prefetch_sync(first * PAGE, count * PAGE)

    def cancel(self, first: int, count: int) -> None:
        """Ask for pages of the region's first layout, and cancel that."""
        self._canceled += 1
        self.host.cancel(first * PAGE, count * PAGE)

    def kill(self, which: int) -> None:
        """Kill the keeper (0) or the worker (1)."""
        self.host.kill(which)

    def fail(self, reads: int) -> None:
        """Let the source's next reads fail; each is tried again more often than that."""
        self._control.fail(reads)

    def resize(self, pages: int) -> None:
        """Resize the region, which nothing has been moved out of; it may move."""
        self._region.resize(pages * PAGE)
        self._resized = True
        piece = self.region
        piece._address = self._region.address
        del piece._cells[pages:]
        piece._cells += [Cell(bytes(PAGE)) for _ in range(pages - len(piece._cells))]

    def collect(self) -> None:
        """Compare which pages were written since the last time."""
        cells = self.region._cells
        found = {page for each in self._monitor.collect() for page in range(each.start // PAGE, each.end // PAGE)}
        expected = {page for page, cell in enumerate(cells) if cell is not None and cell.written}
        right = found >= expected if self._resized else found == expected  # moved page tables lose their protection
        assert right, f"written: {sorted(expected)}, collected: {sorted(found)}"
        self._resized = False
        for cell in cells:
            if cell is not None:
                cell.written = False

    def fork(self) -> bool:
        """Fork: True in the child, which goes on with the block and ends with `exit()`."""
        sys.stdout.flush()
        sys.stderr.flush()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            self._report = write
            self._children = []
            return True
        os.close(write)
        self._children.append((child, read))
        if self.shared or len(self._children) > 3:  # what children of shared memory write is in the model first
            self._wait()
        return False

    def exit(self) -> NoReturn:
        """End a child: all its bytes and its own children are right."""
        self.check()
        self._wait()
        with os.fdopen(self._report, "wb") as file:
            pickle.dump([cell.data for cell in self.file] if self.shared else [], file)
        os._exit(0)

    def _wait(self) -> None:
        children, self._children = self._children, []
        for child, report in children:
            with os.fdopen(report, "rb") as file:
                told = file.read()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status == 0, f"a forked child ended with {status}"
            for cell, data in zip(self.file, pickle.loads(told), strict=False):
                cell.data = data

    def __enter__(self) -> Self:
        self.host.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._owner:
            traceback.print_exception(value)  # a child that fails ends here: the block is its parent's
            sys.stderr.flush()
            os._exit(1)
        if kind is None:
            self.check()
            self._wait()
            self._monitor.check()
            if self.host.local:  # the region is where its object believes it to be: it can be left
                self.host.__exit__()
                self.check()
            counts = {"kills": self.host.kills, "failures": self._control.failures, "canceled": self._canceled}
            sys.stdout.write(f"counts {json.dumps(counts)}\n")  # one write: a pager writes its log there, too
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # the region's object knows nothing of where its memory is by now, so nothing can tidy it up
