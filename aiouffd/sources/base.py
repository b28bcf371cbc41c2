"""What a source is."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["Descriptor", "Source", "ZeroSource"]


@runtime_checkable
class Source(Protocol):
    """`size` bytes that can be read at any offset and that do not change while they are served.

    One event loop uses a source. Until its first read it must be picklable. A source may have these methods and
    attributes, too. The engine looks for them once, when serving begins. The methods must not block.

    - `begin(timeout, retries, on_retry)`: called before all others. `timeout` and `retries` are what the Monitor was
      given (`retries` is None by default), for a source that retries failed reads itself; it calls `on_retry()` for
      each retry, so that the statistics count it.
    - `timeout`, `retries`: attributes, in place of the Monitor's for the reads of this source.
    - `read_nowait(offset, length) -> Buffer | None`: the bytes, if they can be had without waiting.
    - `locate(offset, length) -> int | None`: the address of the bytes in this process, if they are in memory and stay
      there until `aclose`. The engine copies from that address. It asks `locate` before `read_nowait`.
    - `page(offset, length) -> int | None`: as `locate`, but the bytes may be gone with the next call. For single
      pages, which the engine copies at once.
    - `memory() -> tuple[int, int, int, int] | None`: (address, length, descriptor, mtime_ns) of memory of this process
      that has the bytes of the source from its beginning, and stays until `aclose`. `InThread` copies from there
      without a call. For a mapping of a file the descriptor is that of the file and mtime_ns its time of change: only
      pages in the page cache are copied, while the file has that time. Otherwise the descriptor is -1; or -2, if the
      memory maps files that never change, or is unreadable where it does not: what is resident is copied. The last
      number is 0 then, or the address of a byte for each 64 KiB, which becomes 1 when some of them are copied.
    - `memories() -> Iterable[tuple[int, int, tuple[int, int, int, int]]]`: in place of `memory`, for a source in many
      pieces of memory: (start, end, what `memory` returns of one that has these bytes in the same place), in order.
    - `hole(offset, length) -> int`: how many bytes from `offset` on, at most `length`, are known to be zeros. Not
      called if an attribute `sparse` is false. If an attribute `plain` is true, `page` returns None for such bytes, so
      that it may be asked first.
    - `blank(offset, length, block) -> list[int]`: where blocks of zeros begin, relative to `offset`, among bytes that
      `locate` has just found. Those blocks are mapped and not copied. Must be quick if there are none.
    - `mappable(start, end) -> list[tuple[int, int, int, int]] | None`: (start, end, descriptor, place in its file) of
      the files that have these bytes, in whole pages and in order; what is between them is zeros. Other processes may
      map them. None: there are no files for all of it. The descriptors are always the same. Raises a `SourceError`
      where a file has changed.
    - `recording() -> bytes | None`: the content of a file that `record=` has written, of an earlier use of these bytes.
      It is replayed unless the Monitor is given another one, or records. May block.
    - `read_ahead(offset, length)`: in place of `read`, for bytes that no thread waits for. Others may go first.
    - `gives`: an attribute; if it is true, nobody else reads the buffers that `read` returns. The engine may move their
      memory to where it is wanted, so that it holds zeros then.
    - `moved()`: called before the first read, if the engine moves huge pages of what `read` returns, and copies none of
      them: so it makes no difference which processor has received them.
    - `identity`: equal for sources of the same bytes; None: it is not known. `aiouffd serve` reads equal ones once for
      all clients.
    - `keeps`: if it is true, what is asked for twice at once, or soon again, is not fetched twice. Else the engine sees
      to that, where several clients read the same source.
    - `expect(offset, length)`: these bytes will probably be read next; the range may reach behind `size`. The source
      may fetch them in the background.
    - `async write(offset, data)`: take back what was written to memory, so that the next `read` returns it (for
      `write_back=True`). `offset` is that of a page; `data` is whole pages, or ends with the source. Returns when the
      bytes are accepted. What it raises is reported, and the bytes stay in memory.
    - `async write_many(parts)`: in place of several calls of `write`: a list of (offset, data). If it raises, each is
      written by `write`.
    - `async sync()`: return when all that was written is durable.
    - `begin_sync(offset, length)`: there will be a `sync` soon, of what was written there among others. The source may
      begin in the background.
    - `writable`: an attribute; if it is false, there is a `write` but it may not be called.
    - `async aclose()`: called once, when serving ends.
    """

    @property
    def size(self) -> int:
        """The length in bytes. It never changes. The first use may block, and happens in a thread."""

    async def read(self, offset: int, length: int) -> Any:
        """Return a contiguous buffer with the bytes [offset, offset + length), all of them below `size`.

        Canceling must be safe. After a `SourceError` the pages that need these bytes fail. Other exceptions, and a
        `SourceTimeoutError`, are retried first. A buffer of another length is a `ShortReadError`.

        `raise SourceError(repr(self), offset, length, "why")`: it takes these four arguments.
        """


class ZeroSource:
    """`size` zero bytes. Pages are mapped from the kernel's zero page."""

    def __init__(self, size: int) -> None:
        self.size = size

    def hole(self, offset: int, length: int) -> int:
        """Return `length`: all of it is a hole."""
        return length

    async def read(self, offset: int, length: int) -> bytes:
        """Return zeros."""
        return bytes(length)

    def __repr__(self) -> str:
        return f"ZeroSource({self.size})"


class Descriptor:
    """A file descriptor that is sent to the pager beside a pickle. It belongs to this object.

    A source that holds descriptors defines `travel()`. It returns `(callable, arguments)` as `__reduce__` does, with a
    `Descriptor` in place of each of them. `__reduce__` itself is for other pickles.
    """

    def __init__(self, fd: int) -> None:
        self.fd: int = fd

    def detach(self) -> int:
        """Return the descriptor, which belongs to the caller from now on."""
        fd, self.fd = self.fd, -1
        return fd
