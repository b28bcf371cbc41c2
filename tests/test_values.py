"""`values`: classes that are their fields."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any, ClassVar

import pytest

import aiouffd
from aiouffd.kernel.events import Remove, Unmap
from aiouffd.values import Struct, Value, above_zero, above_zero_or_none, at_least, field


class Point(Value):
    """A value."""

    x: int
    y: int
    names: tuple[str, ...] = ()
    origin: ClassVar[int] = 0


class Place(Point):
    """One more field, in the end."""

    height: int = 5

    def _check(self) -> None:
        at_least(0, height=self.height)


class Basket(Struct):
    """May be changed."""

    owner: str
    things: list[str] = field(factory=list)
    color: str = field(kw_only=True)


def test_a_value_is_its_fields() -> None:
    """By place or by name; equal to its like only."""
    point = Point(1, y=2)
    assert point == Point(1, 2, ())
    assert hash(point) == hash(Point(x=1, y=2))
    assert point != Point(1, 3)
    assert Remove(0, 1) != Unmap(0, 1)
    assert (point == (1, 2, ())) is False
    assert repr(point) == "Point(x=1, y=2, names=())"
    assert point.as_dict() == {"x": 1, "y": 2, "names": ()}
    match point:
        case Point(x, y, names):
            assert (x, y, names) == (1, 2, ())


def test_a_value_is_not_changed() -> None:
    """Another one is made."""
    point = Point(1, 2)
    with pytest.raises(AttributeError, match="'x' of a Point cannot be set"):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="'x' of a Point cannot be deleted"):
        del point.x
    assert point.replace(x=3) == Point(3, 2) == point.__replace__(x=3)
    assert point == Point(1, 2)


def test_a_value_travels() -> None:
    """By copy and by pickle."""
    for value in (aiouffd.Range(1, 2), Remove(0, 1)):
        assert copy.copy(value) == copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value


def test_fields_are_inherited() -> None:
    """Those of the base come first, and each object is checked."""
    place = Place(1, 2, ("a",))
    assert place.as_dict() == {"x": 1, "y": 2, "names": ("a",), "height": 5}
    assert place != Point(1, 2, ("a",))
    with pytest.raises(ValueError, match="'height' must be >= 0: -1"):
        place.replace(height=-1)


def test_a_subclass_of_a_module_that_evaluates_annotations() -> None:
    """As a program may have one."""
    made: Any = type("Own", (Point,), {"__annotations__": {"z": int, "kinds": ClassVar[int]}, "z": 3})
    assert made(1, 2).as_dict() == {"x": 1, "y": 2, "names": (), "z": 3}


def test_what_may_be_changed_is_itself() -> None:
    """Its defaults are its own."""
    one, other = Basket("a", color="red"), Basket("a", color="red")
    assert one != other
    one.things.append("apple")
    one.owner = "b"
    assert (one.things, other.things, other.owner) == (["apple"], [], "a")
    assert one.replace(color="blue").things is one.things


def test_help_shows_the_fields() -> None:
    """As the class declares them."""
    assert str(inspect.signature(Place)) == "(x: 'int', y: 'int', names: 'tuple[str, ...]' = (), height: 'int' = 5)"
    assert str(inspect.signature(Basket)) == "(owner: 'str', things: 'list[str]' = ..., *, color: 'str')"
    assert str(inspect.signature(aiouffd.InThread)).startswith("(stuck_warning: 'float' = 2.0, stuck_limit: ")


@pytest.mark.parametrize(
    ("values", "named"),
    [((1,), {}), ((1, 2, (), 4), {}), ((1, 2), {"z": 3}), ((1, 2), {"x": 1}), ((), {"x": 1}), ((1,), {"x": 1, "y": 2})],
)
def test_what_the_fields_are_not(values: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Too few, too many, unknown or twice: the error says what they are."""
    with pytest.raises(TypeError, match="Point takes x, y, names; not"):
        Point(*values, **named)
    with pytest.raises(TypeError, match="Basket takes"):
        Basket("a")  # type: ignore[call-arg]


@pytest.mark.parametrize("wrong", [-1, float("nan")])
def test_bounds(wrong: float) -> None:
    """What is no number is not within them either; the error says the name."""
    at_least(0, a=0, b=7)
    above_zero(a=0.1)
    above_zero_or_none(a=None, b=1)
    for check, value in ((lambda **n: at_least(0, **n), wrong), (above_zero, wrong), (above_zero_or_none, wrong)):
        with pytest.raises(ValueError, match="'b' must be"):
            check(b=value)
    for check in (above_zero, above_zero_or_none):
        with pytest.raises(ValueError, match="'b' must be > 0"):
            check(b=0)
