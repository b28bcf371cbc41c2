"""`engine.prefetch`: which bytes come with a fault."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.readahead import Readahead

PAGE = 4096
END = 1 << 30


def touch(readahead: Readahead, offsets: list[int], end: int = END) -> tuple[int, int]:
    """Touch the offsets in order, faulting where a page is missing; return (faults, pages brought).

    All that is chosen, and nothing else, is noted.
    """
    present: set[int] = set()
    faults = 0
    noted: list[tuple[int, int, int]] = []
    readahead.note = lambda *chosen: noted.append(chosen)
    for offset in offsets:
        page = offset // PAGE
        if page in present:
            continue
        faults += 1
        noted.clear()
        chosen = readahead.windows(page * PAGE, 0, end)
        for start, length in chosen:
            present.update(range(start // PAGE, (start + length) // PAGE))
        assert page in present
        assert noted == [(page * PAGE, *window) for window in chosen]
    return faults, len(present)


@given(
    st.lists(st.integers(0, 400), max_size=200),
    st.sampled_from([0, PAGE, 3 * PAGE, 64 << 10, 2 << 20]),
    st.integers(401, 450),
)
def test_windows_hold_the_fault_and_stay_within_bounds(pages: list[int], limit: int, end: int) -> None:
    """Whatever the touchers do: whole pages, in bounds, at most the limit, the faulting page among them."""
    readahead = Readahead(PAGE, limit)
    for page in pages:
        windows = readahead.windows(page * PAGE, 0, end * PAGE)
        assert any(start <= page * PAGE < start + length for start, length in windows)
        assert sum(length for _, length in windows) <= max(limit, PAGE)
        for start, length in windows:
            assert start % PAGE == 0
            assert length % PAGE == 0
            assert 0 <= start < start + length <= end * PAGE


@given(
    st.lists(st.integers(0, 400), max_size=100),
    st.sampled_from([PAGE, 3 * PAGE, 2 << 20]),
    st.integers(0, 50),
    st.integers(401, 450),
)
def test_blocks_hold_the_fault_and_what_is_missing_around_it(pages: list[int], size: int, low: int, end: int) -> None:
    """Whole pages of one block, in bounds; nothing that is present, and all that lies between."""
    readahead = Readahead(PAGE, 2 << 20)
    present: set[int] = set()
    for page in pages:
        if page < low:
            continue
        present.discard(page)
        start, length = readahead.block(page * PAGE, size, low * PAGE, end * PAGE)
        assert (start, length) == readahead.block(page * PAGE, size, low * PAGE, end * PAGE)  # nothing was noted
        assert start % PAGE == length % PAGE == 0
        brought = range(start // PAGE, (start + length) // PAGE)
        assert page in brought
        block = range(page * PAGE // size * size // PAGE, (page * PAGE // size * size + size) // PAGE)
        assert max(low, block.start) <= brought.start < brought.stop <= min(end, block.stop)
        assert not present & set(brought)
        before, behind = brought.start - 1, brought.stop
        assert before < max(low, block.start) or before in present
        assert behind >= min(end, block.stop) or behind in present
        readahead.brought(start, length)
        present |= set(brought)


@given(st.lists(st.integers(0, 400), max_size=100))
def test_what_is_present_is_not_brought_again(pages: list[int]) -> None:
    """Windows spare what earlier windows have brought, as long as it has not faulted again."""
    readahead = Readahead(PAGE, 2 << 20)
    present: set[int] = set()
    for page in pages:
        if page in present:
            continue
        for start, length in readahead.windows(page * PAGE, 0, 401 * PAGE):
            brought = set(range(start // PAGE, (start + length) // PAGE))
            assert not brought & present
            present |= brought


def test_limit_zero_is_page_by_page() -> None:
    """`readahead=0` brings the page and nothing else."""
    assert touch(Readahead(PAGE, 0), [n * PAGE for n in range(100)]) == (100, 100)


def test_sequential_touchers_get_the_largest_window_soon() -> None:
    """64 MiB in order take a few faults more than 64 MiB / 2 MiB, and nothing is brought that is not touched."""
    readahead = Readahead(PAGE, 2 << 20)
    faults, brought = touch(readahead, [n * PAGE for n in range(16384)], end=16384 * PAGE)
    assert faults <= 32 + 10
    assert brought == 16384
    assert readahead.follows
    readahead.windows(100 << 30, 0, 1 << 40)
    assert not readahead.follows


def test_several_streams_at_once() -> None:
    """Eight interleaved sequential touchers are each recognised."""
    offsets = [stream * (64 << 20) + n * PAGE for n in range(2048) for stream in range(8)]
    faults, _ = touch(Readahead(PAGE, 2 << 20), offsets)
    assert faults <= 8 * 14


def test_a_toucher_that_goes_down_is_recognised() -> None:
    """Backwards in order is as good as forwards."""
    for around in (PAGE, 4 * PAGE, 16 * PAGE):
        faults, brought = touch(Readahead(PAGE, 2 << 20, around), [n * PAGE for n in range(16383, -1, -1)])
        assert faults <= 32 + 10
        assert brought <= 16384 + 16


def test_strides_bring_what_will_be_touched_and_little_else() -> None:
    """A column of a matrix, one page each MiB: few faults, few bytes in vain."""
    offsets = [n << 20 for n in range(1000)]
    faults, brought = touch(Readahead(PAGE, 2 << 20), offsets)
    assert faults < 100
    assert brought < 1200


def test_random_touchers_fall_back_to_single_pages() -> None:
    """Where nothing is in order, the neighbourhood shrinks to the page: bytes in vain stay below a tenth."""
    rng = random.Random(7)
    offsets = rng.sample(range(0, 1 << 38, PAGE), 5000)
    _, brought = touch(Readahead(PAGE, 2 << 20), offsets, end=1 << 38)
    assert brought < 5500


def test_removed_pages_may_be_brought_again() -> None:
    """After `forget`, a window may hold the pages once more."""
    readahead = Readahead(PAGE, 64 << 10)
    touch(readahead, [n * PAGE for n in range(64)])
    assert readahead.missing(0, 64 * PAGE) == []
    readahead.forget(16 * PAGE, 20 * PAGE)
    assert readahead.missing(0, 64 * PAGE) == [(16 * PAGE, 4 * PAGE)]


def test_memory_stays_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many random pages leave a bounded state behind."""
    monkeypatch.setattr("aiouffd.engine.present._MAX_CHUNKS", 1024)
    readahead = Readahead(PAGE, 64 << 10)
    rng = random.Random(1)
    for _ in range(20_000):
        readahead.windows(rng.randrange(1 << 28) * PAGE, 0, 1 << 40)
    assert len(readahead._present._chunks) <= 1024
    assert len(readahead._streams) <= 16
    assert len(readahead._strangers) <= 16


def test_a_fault_on_a_page_that_counts_as_present_is_believed_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each thread; where a window was chosen and not placed, at once. So many threads are remembered."""
    monkeypatch.setattr("aiouffd.engine.readahead._MAX_DOUBTS", 3)
    readahead = Readahead(PAGE, 64 << 10)
    assert not readahead.is_doubtful(0, 1)
    readahead.brought(0, 4 * PAGE)
    assert [readahead.is_doubtful(0, thread) for thread in (1, 2, 2, 1, 1)] == [True, True, False, False, True]
    assert readahead.is_doubtful(PAGE, 1)
    readahead.not_placed(0, (0, PAGE))
    assert not readahead.is_doubtful(0, 9)
    for thread in range(9):
        assert readahead.is_doubtful(2 * PAGE, thread)
        assert len(readahead._doubts) <= 3


def test_the_window_behind_a_stream_at_full_speed() -> None:
    """One window ahead, and no more before the toucher is in it; nothing for strangers, or beyond the end."""
    policy = Readahead(PAGE, 64 * PAGE, 4 * PAGE)
    size = 1000 * PAGE
    assert policy.follow(0, 0, size) is None
    at = 0
    while True:
        ((start, length),) = policy.windows(at, 0, size)
        if length == 64 * PAGE:
            break
        assert policy.follow(at, 0, size) is None  # not at full speed yet
        at = start + length
    noted: list[tuple[int, int, int]] = []
    policy.note = lambda *chosen: noted.append(chosen)
    ahead = policy.follow(at, 0, size)
    policy.touched(7 * PAGE)
    assert noted == [(-1, at + 64 * PAGE, 64 * PAGE), (7 * PAGE, 7 * PAGE, 0)]
    assert policy.fresh().note is policy.note
    assert ahead == ((at + 64 * PAGE, 64 * PAGE), (at + 128 * PAGE, 128 * PAGE))
    assert policy.follow(at, 0, size) is None  # it is in the first window still
    assert policy.follow(at + 63 * PAGE, 0, size) is None
    assert policy.follow(at + 70 * PAGE, 0, at + 200 * PAGE) == (
        (at + 128 * PAGE, 64 * PAGE),
        (at + 192 * PAGE, 8 * PAGE),
    )
    assert policy.follow(900 * PAGE, 0, size) is None
    assert policy.follow(at + 130 * PAGE, 0, at + 200 * PAGE) == ((at + 192 * PAGE, 8 * PAGE), (at + 200 * PAGE, 0))


def test_the_window_before_a_stream_that_goes_down() -> None:
    """As upwards."""
    policy = Readahead(PAGE, 64 * PAGE, 4 * PAGE)
    size = 1000 * PAGE
    at = size - PAGE
    while True:
        ((start, length),) = policy.windows(at, 0, size)
        if length == 64 * PAGE:
            break
        at = start - PAGE
    assert start + length == at + PAGE
    assert policy.follow(at, 0, size) == ((start - 64 * PAGE, 64 * PAGE), (start - 192 * PAGE, 128 * PAGE))
    assert policy.follow(at, 0, size) is None
    assert policy.follow(start - PAGE, start - 70 * PAGE, size) == (
        (start - 70 * PAGE, 6 * PAGE),
        (start - 70 * PAGE, 0),
    )


def test_the_window_below_a_stream_at_full_speed() -> None:
    """As above it: one window ahead, nothing where there is none, and what is present is left out."""
    policy = Readahead(PAGE, 64 * PAGE, 4 * PAGE)
    size = 1000 * PAGE
    at = 999 * PAGE
    while True:
        ((start, length),) = policy.windows(at, 0, size)
        if length == 64 * PAGE:
            break
        at = start - PAGE
    assert policy.follow(start + PAGE, 0, size) == (
        (start - 64 * PAGE, 64 * PAGE),
        (start - 192 * PAGE, 128 * PAGE),
    )
    assert policy.follow(start + PAGE, 0, size) is None
    low = start - 64 * PAGE
    assert policy.missing(low, start) == []
    policy.brought(low - 64 * PAGE, 64 * PAGE)
    assert policy.follow(low + PAGE, 0, size) is None  # all of it is present
    policy.forget(low - 2 * PAGE, low)
    assert policy.follow(low + PAGE, 0, size) == (
        (low - 2 * PAGE, 2 * PAGE),
        (low - 130 * PAGE, 128 * PAGE),
    )
    assert policy.follow(low - PAGE, low - 2 * PAGE, size) is None  # its mapping ends there


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize(("most", "ahead"), [(0, 64), (64, 64), (100, 64), (192, 192), (9999, 256)])
def test_a_stream_that_has_run_far_is_followed_further(most: int, ahead: int, *, up: bool) -> None:
    """Whole windows, until a quarter of what it has run through is ahead of its window, or so much as is allowed."""
    policy = Readahead(PAGE, 64 * PAGE, 4 * PAGE)
    size = 10_000 * PAGE
    at = 0 if up else size - PAGE
    while abs(at - (0 if up else size - PAGE)) < 1024 * PAGE:
        ((start, length),) = policy.windows(at, 0, size)
        at = start + length if up else start - PAGE
    ((start, length),) = policy.windows(at, 0, size)
    pages = 0
    while (found := policy.follow(at, 0, size, most * PAGE)) is not None:
        (begin, more), _ = found
        assert begin == start + length if up else begin + more == start
        start, length = begin, more
        pages += more // PAGE
    assert pages == ahead
    assert policy.follow(at, 0, size, most * PAGE) is None


@given(
    st.integers(1, 6000),
    st.integers(0, 5000),
    st.booleans(),
    st.sampled_from([0, 100, 1 << 20]),
    st.integers(1, 400),
)
def test_little_is_brought_in_vain_and_nothing_twice(run: int, before: int, up: bool, most: int, lag: int) -> None:
    """However far a stream is followed, wherever its mapping and it end, and however late its pages come."""
    policy = Readahead(PAGE, 64 * PAGE, 16 * PAGE)
    low, high = before, before + 6000
    brought: dict[int, int] = {}  # page -> the touch that brought it
    for touch in range(run):
        page = low + touch if up else high - 1 - touch
        chosen = []
        if page not in brought:
            chosen = policy.windows(page * PAGE, low * PAGE, high * PAGE)
        elif brought[page] + lag > touch:  # it is on its way, and its toucher waits
            brought[page] = touch - lag
        else:
            continue
        while (found := policy.follow(page * PAGE, low * PAGE, high * PAGE, most * PAGE)) is not None:
            chosen.append(found[0])
        for start, length in chosen:
            pages = range(start // PAGE, (start + length) // PAGE)
            assert low <= pages.start < pages.stop <= high
            assert not any(other in brought for other in pages)
            brought |= dict.fromkeys(pages, touch)
        assert page in brought
    assert len(brought) - run <= 2 * 64 + max(64, min(run // 4, most))


def test_losses_are_counted() -> None:
    """So that whoever was told that all is present can know that it is doubtful."""
    policy = Readahead(PAGE, 64 * PAGE)
    policy.brought(0, 4 * PAGE)
    assert policy.losses == 0
    policy.forget(0, PAGE)
    policy.forget(8 * PAGE, 9 * PAGE)
    assert policy.losses == 2
    policy.not_brought(PAGE, 2 * PAGE)
    assert policy.losses == 2
    assert policy.missing(0, 4 * PAGE) == [(0, 2 * PAGE)]
    assert policy.fresh().losses == 0
    assert policy.fresh().missing(0, 4 * PAGE) == [(0, 4 * PAGE)]


def test_where_streams_are_expected() -> None:
    """Around the window of one in order, at the next page of one that strides; the last seen one first."""
    readahead = Readahead(PAGE, 16 * PAGE, 4 * PAGE)
    assert readahead.expected() == []
    for page in (0, 4, 12, 500, 499, 200, 210, 220):
        readahead.windows(page * PAGE, 0, 1000 * PAGE)
    assert readahead.expected() == [
        (240 * PAGE, 241 * PAGE),
        (483 * PAGE, 512 * PAGE),
        (-17 * PAGE, 44 * PAGE),
    ]
    fresh = readahead.fresh()
    assert (fresh.page, fresh.limit, fresh.around, fresh.expected()) == (PAGE, 16 * PAGE, 4 * PAGE, [])


@pytest.mark.parametrize("step", [3, -3])
@pytest.mark.parametrize(("room", "count"), [(4, 2), (3, 1)])
def test_a_stride_ends_with_its_mapping(step: int, room: int, count: int) -> None:
    """At its first page and at its last one; the page that faults comes, whatever was known of it, and each once."""
    readahead = Readahead(PAGE, 16 * PAGE, PAGE)
    last = 500 + 2 * step
    low, high = (0, last + room) if step > 0 else (last - room + 1, 1000)
    for page in (500, 500 + step):
        readahead.windows(page * PAGE, low * PAGE, high * PAGE)
    readahead.brought(last * PAGE, PAGE)
    chosen = [(page * PAGE, PAGE) for page in (last, last + step)[:count]]
    assert readahead.windows(last * PAGE, low * PAGE, high * PAGE) == chosen
    assert not any(readahead.missing(start, start + length) for start, length in chosen)


@pytest.mark.parametrize(("pages", "window"), [((0, 1, 2), (2, 2)), ((3, 2, 1), (0, 2))])
def test_a_stride_of_one_page_is_one_run(pages: tuple[int, int, int], window: tuple[int, int]) -> None:
    """Of a toucher who comes upon pages that were brought, and are gone."""
    readahead = Readahead(PAGE, 16 * PAGE, 4 * PAGE)
    for page in pages:
        chosen = readahead.windows(page * PAGE, 0, 1000 * PAGE)
        readahead.forget(0, 1000 * PAGE)
    assert chosen == [(window[0] * PAGE, window[1] * PAGE)]


@pytest.mark.parametrize(("skipped", "follows"), [(3, True), (4, False)])
def test_a_stream_may_skip_a_little(skipped: int, follows: bool) -> None:
    """Less than its window, upwards and downwards; once it has a direction, it does not turn."""
    for direction in (1, -1):
        readahead = Readahead(PAGE, 16 * PAGE, 4 * PAGE)
        readahead.windows(400 * PAGE, 0, 1000 * PAGE)
        at = 404 + skipped if direction > 0 else 399 - skipped
        (window,) = readahead.windows(at * PAGE, 0, 1000 * PAGE)
        assert (window[1] == 8 * PAGE) == follows
        if follows:
            other = 399 if direction > 0 else 404
            (window,) = readahead.windows(other * PAGE, 0, 1000 * PAGE)
            assert window[1] <= 4 * PAGE
