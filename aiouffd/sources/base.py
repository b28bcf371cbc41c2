"""What a source is."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["Descriptor", "Source", "ZeroSource"]


@runtime_checkable
class Source(Protocol):
    """`size` bytes that can be read at any offset, and that do not change while they are served.

    A source is used on one loop, and is picklable until it has been read from. Optional methods, looked up once
    when serving begins:

    - `read_nowait(offset, length) -> Buffer | None`: the bytes, if they are at hand without waiting.
    - `locate(offset, length) -> int | None`: the address in this process where the bytes lie and stay until
      `close`, if they are at hand: they are copied straight from there. Asked before `read_nowait`.
    - `page(offset, length) -> int | None`: as `locate`, but the bytes need not stay there longer than until the next
      call: for single pages, which are copied at once.
    - `memory() -> tuple[int, int, int] | None`: (address, length, descriptor) of memory of this process that shows the
      source from its beginning on, and stays until `aclose`: what is missing can be copied from there without asking
      (`in_thread`). Where it is a mapping of a file, the descriptor is that file's, and only pages that are in the page
      cache are copied; else -1.
    - `hole(offset, length) -> int`: how many bytes from `offset` on, at most `length`, are known to be zeros; not
      asked where an attribute `sparse` is false.
    - `blank(offset, length, block) -> list[int]`: where, counted from `offset`, blocks begin that are zeros, among
      bytes that `locate` has just found. They are mapped then, and not copied. Quick where there are none.
    - `expect(offset, length)`: these bytes, partly behind `size` perhaps, are likely to be wanted next: bring them to
      hand in the background, if that is worth it. Returns at once.
    - `async aclose()`: called once when serving ends.
    """

    @property
    def size(self) -> int:
        """How many bytes there are."""

    async def read(self, offset: int, length: int) -> Any:
        """Return a buffer with exactly the bytes [offset, offset + length), which lie below `size`.

        Canceling is safe. An exception is retried or fails the pages that need these bytes; a shorter buffer is
        a `ShortReadError`.
        """


class ZeroSource:
    """`size` zero bytes; pages are mapped from the kernel's zero page."""

    def __init__(self, size: int) -> None:
        self.size = size

    def hole(self, offset: int, length: int) -> int:
        """Everything is a hole."""
        return length

    async def read(self, offset: int, length: int) -> bytes:
        """Return zeros."""
        return bytes(length)

    def __repr__(self) -> str:
        return f"ZeroSource({self.size})"


class Descriptor:
    """A file descriptor that travels to the pager beside a pickle. It belongs to this object.

    A source that holds descriptors defines `travel()`, which returns `(callable, arguments)` as `__reduce__`
    does, with a `Descriptor` in place of each; `__reduce__` itself stays for pickles that go elsewhere.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> int:
        """Give the descriptor away: it is the caller's now."""
        fd, self.fd = self.fd, -1
        return fd
