"""`kernel.owned_descriptor`: a descriptor is closed once, whatever ends its object."""

from __future__ import annotations

import gc
import os

import pytest

from aiouffd.kernel.owned_descriptor import OwnedDescriptor


class Pipe(OwnedDescriptor):
    """Owns one end of a pipe."""

    def __init__(self) -> None:
        self.other, self._fd = os.pipe()

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self._fd


def is_open(fd: int) -> bool:
    """Tell whether a descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("how", ["close", "with", "last reference"])
def test_each_way_of_closing(how: str) -> None:
    """By `close()`, by leaving the block, by dropping it."""
    pipe = Pipe()
    fd, other = pipe.fd, pipe.other
    assert not pipe.closed
    if how == "with":
        with pipe:
            assert is_open(fd)
        assert pipe.closed
    elif how == "close":
        pipe.close()
    else:
        del pipe
        gc.collect()
    assert not is_open(fd)
    os.close(other)


def test_another_descriptor_of_the_same_number_stays_open() -> None:
    """`close()` a second time, and the end of the object, close nothing."""
    pipe = Pipe()
    number = pipe.fd
    pipe.close()
    again = os.dup2(pipe.other, number)
    pipe.close()
    other = pipe.other
    del pipe
    gc.collect()
    assert is_open(again)
    os.close(again)
    os.close(other)


def test_an_object_that_was_never_made_owns_nothing() -> None:
    """Its constructor raised before there was a descriptor."""
    made = OwnedDescriptor.__new__(OwnedDescriptor)
    assert made.closed
    made.close()
