"""`engine.options`: what serves, and how."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import pytest
from engine_world import LOCATED

from aiouffd.engine.options import Options, checked
from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.handler import Handler
from aiouffd.kernel.abi import RegisterMode


@pytest.mark.parametrize("origin", [LOCATED, Handler()])
def test_what_can_serve(origin: Any) -> None:
    """Is returned as it is."""
    assert checked(origin) is origin


@pytest.mark.parametrize("origin", [Handler, type(LOCATED), object(), bytes(1 << 20), None])
def test_what_cannot_serve(origin: Any) -> None:
    """Classes in place of instances, bytes, nothing; the text does not repeat a megabyte."""
    with pytest.raises(TypeError, match="is no Source and no Handler") as raised:
        checked(origin)
    assert len(str(raised.value)) < 300


def test_a_large_buffer_is_named_by_its_beginning() -> None:
    """Its representation has four characters a byte."""
    with pytest.raises(TypeError, match="is no Source and no Handler") as caught:
        checked(bytes(1 << 20))
    assert len(str(caught.value)) < 400


def test_a_handler_that_does_nothing_of_its_own() -> None:
    """Whose author has mistyped a name: it would give zeros."""

    class Mistyped(Handler):
        async def pagefalt(self, fault: Any, batch: Any) -> None:
            """Nobody calls it."""

    class Right(Mistyped):
        async def remove(self, event: Any) -> None:
            """Zeros are what it wants."""

    with pytest.raises(
        TypeError, match="Mistyped overrides none of pagefault, write, fork, remap, remove, unmap, aclose"
    ):
        checked(Mistyped())
    assert checked(right := Right()) is right


def test_a_handler_of_plain_functions() -> None:
    """Nobody could await them. What a decorator has wrapped is looked at, and not the wrapper."""

    class Plain(Handler):
        def pagefault(self, fault: Any, batch: Any) -> None:  # type: ignore[override]
            """No coroutine."""

    class Generator(Handler):
        async def remove(self, event: Any) -> Any:
            yield event

    class Wrapped(Handler):
        def pagefault(self, fault: Any, batch: Any) -> Any:
            """Return a coroutine, as a decorator's function does."""
            return super().pagefault(fault, batch)

    functools.update_wrapper(Wrapped.pagefault, Handler.pagefault)
    with pytest.raises(TypeError, match=r"Plain\.pagefault is no coroutine function: it must be `async def pagefault"):
        checked(Plain())
    with pytest.raises(TypeError, match=r"Generator\.remove is no coroutine function"):
        checked(Generator())
    assert checked(wrapped := Wrapped()) is wrapped


def test_a_source_has_a_size() -> None:
    """As an attribute, a property, or by way of another object, and not as a method. It is not asked for."""

    class Without:
        async def read(self, _offset: int, _length: int) -> bytes:
            return b""

    class Method(Without):
        def size(self) -> int:
            raise AssertionError

    class Property(Without):
        @property
        def size(self) -> int:
            raise AssertionError

    class Proxy(Without):
        def __getattr__(self, name: str) -> int:
            raise AssertionError

    for wrong in (Without(), Method()):
        with pytest.raises(TypeError, match=f"{type(wrong).__name__} has no `size`: a source has an attribute"):
            checked(wrong)
    given = Without()
    given.size = 7  # type: ignore[attr-defined]
    for right in (given, Property(), Proxy()):
        assert checked(right) is right


def test_options() -> None:
    """Defaults, and what is refused."""
    options = Options()
    assert (options.readahead, options.spin_us, options.background, options.write_protect) == (2 << 20, 50, 0.0, False)
    assert options.modes == RegisterMode.MISSING
    other = Options(1, 2, 3.0, 4, True, Limits(5), "retry", 6, True)
    assert other.of(RegisterMode.WP) == attrs.evolve(other, modes=RegisterMode.WP)
    assert options.limits == Limits()
    for wrong in ({"readahead": -1}, {"spin_us": -1}, {"background": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Options(**wrong)
