"""What all readers of arrays share."""

from __future__ import annotations

import concurrent.futures
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from array_files import npz, region_of, tensors

import aiouffd
from aiouffd.formats import Npy, Npz, Safetensors

if TYPE_CHECKING:
    from collections.abc import Iterable

PAGE = 4096
TABLE = np.arange(64 * PAGE, dtype=np.uint8).reshape(64, PAGE)
FILE = tensors({"table": TABLE, "end": np.zeros(10, np.uint8)}, {"table": "U8", "end": "U8"})


class Asked:
    """A Monitor that takes note of what it is asked for."""

    serves_here = True

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.requests = 0
        self.origin = "the origin"

    def ask_for(self, ranges: Iterable[aiouffd.Range]) -> concurrent.futures.Future[None]:
        """Return what is done."""
        self.prefetch_sync(ranges)
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        future.set_result(None)
        return future

    def prefetch_sync(self, ranges: Iterable[aiouffd.Range]) -> None:
        """Bring nothing."""
        self.requests += 1
        self.ranges += [(each.start, each.length) for each in ranges]

    def taken(self) -> list[tuple[int, int]]:
        """Return what was asked for since the last call, by one request."""
        assert self.requests == 1
        ranges, self.ranges, self.requests = self.ranges, [], 0
        return ranges


@pytest.fixture
def file() -> Any:
    """Return a file that begins its tensors at an odd place, served by nobody but noted."""
    region = region_of(FILE)
    file = Safetensors(region)
    region.monitor = Asked()
    yield file
    region.monitor = None


def pages(start: int, length: int) -> tuple[int, int]:
    """Return the pages of a range, as (start, length)."""
    first = start // PAGE * PAGE
    return first, min(-(-(start + length) // PAGE) * PAGE, len(FILE)) - first


def test_a_prefetch_is_of_whole_pages(file: Any) -> None:
    """Of a tensor, a row, some rows, the last bytes: no more than the pages that they are on, each once."""
    at, asked = file.info("table").start, file.region.monitor
    file.prefetch_tensor_sync("table")
    assert asked.taken() == [pages(at, 64 * PAGE)]
    file.prefetch_tensor_sync(file["table"][5])
    assert asked.taken() == [pages(at + 5 * PAGE, PAGE)]
    file.prefetch_tensor_sync(*(file["table"][row] for row in (40, 5, 6, 5)))
    assert asked.taken() == [pages(at + 5 * PAGE, 2 * PAGE), pages(at + 40 * PAGE, PAGE)]
    file.prefetch_tensor_sync(file["table"][::30, :7])
    assert asked.taken() == [pages(at + row * PAGE, 7) for row in (0, 30, 60)]
    file.prefetch_tensor_sync("end")
    assert asked.taken() == [pages(file.info("end").start, 10)]
    file.ask_for_tensor("table", file["end"]).result()
    assert asked.taken() == [pages(at, 64 * PAGE + 10)]
    file.prefetch_tensor_sync()
    assert asked.taken() == []


async def test_a_prefetch_of_a_program_with_a_loop(file: Any) -> None:
    """Asks for the same."""
    await file.prefetch_tensor("end", file["table"][3])
    assert len(file.region.monitor.taken()) == 2


def test_what_is_not_on_the_region(file: Any) -> None:
    """Copies, and names that the file does not have."""
    for array in (file["table"].copy(), file["table"][1, 2]):
        with pytest.raises(ValueError, match="it is a copy"):
            file.prefetch_tensor_sync(array)
    with pytest.raises(KeyError):
        file.prefetch_tensor_sync("tables")
    with pytest.raises(TypeError, match=r"Npy takes a region: Npy\(aiouffd\.map\('x\.npy'\)\)"):
        Npy("x.npy")  # type: ignore[arg-type]
    assert not file.region.monitor.requests


async def test_rows(file: Any) -> None:
    """Are what an index with the same list copies: in any order, from the end, in Fortran's order; once each."""
    at, asked = file.info("table").start, file.region.monitor
    file.prefetch_rows_sync("table", np.array([40, 5, -58, 5]))
    assert asked.taken() == [pages(at + 5 * PAGE, 2 * PAGE), pages(at + 40 * PAGE, PAGE)]
    await file.prefetch_rows("end", [9])
    assert asked.taken() == [pages(file.info("end").start + 9, 1)]
    for rows in ([64], [0, -65]):
        with pytest.raises(IndexError, match=r"'table' of the shape \(64, 4096\) has no row"):
            file.prefetch_rows_sync("table", rows)
    content = io.BytesIO()
    np.save(content, np.asfortranarray(TABLE.T))  # a column is in one piece
    region = region_of(content.getvalue())
    fortran = Npy(region)
    region.monitor = Asked()
    fortran.prefetch_rows_sync("array", [-4096])
    assert region.monitor.taken() == [(0, 64 * PAGE)]
    region.monitor = None


def test_the_headers_of_members_are_brought_at_once() -> None:
    """Not one after the other: a file of many members would wait for each."""
    arrays: dict[str, Any] = {f"a{number}": np.zeros(3 * PAGE, np.uint8) for number in range(9)}
    region = region_of(npz(**arrays))
    file = Npz(region)
    region.monitor = asked = Asked()
    asked_before: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aiouffd.Region, "bring", lambda *_: asked_before.append(len(asked.ranges)))
        file.prefetch_tensor_sync(*arrays)
    assert min(asked_before) >= 5  # headers, on pages that some share
    region.monitor = None


def test_errors_name_what_the_region_shows() -> None:
    """Its source, where it has a Monitor."""
    region = region_of(b"1234")
    region.monitor = Asked()
    with pytest.raises(aiouffd.FormatError, match=r"^'the origin', at byte 0"):
        Safetensors(region)
    region.monitor = None


def test_its_repr(file: Any) -> None:
    """Says what it is of."""
    assert repr(file).startswith("<Safetensors, 2 arrays on <Region")
