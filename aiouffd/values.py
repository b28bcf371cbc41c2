"""Classes that are their fields: a `Value` is frozen and compared by them, a `Struct` may be changed and is itself.

The fields are the annotations, in order. This is the small part of attrs that aiouffd uses. attrs and dataclasses write
source text for each class and compile it when it is imported: 0.4 ms a class, and 15 ms for attrs itself, in each
process that is started. That was a quarter of a first Monitor, which starts a pager.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

__all__ = ["Struct", "Value", "above_zero", "above_zero_or_none", "at_least", "field"]


class _Field:
    def __init__(self, factory: Callable[[], Any] | None) -> None:
        self.factory = factory

    def __repr__(self) -> str:
        return "..."  # as a signature in a stub has it, which tools can parse


def field(*, factory: Callable[[], Any] | None = None, kw_only: bool = False) -> Any:  # noqa: ARG001 - for type checkers
    """Say of a field that its default is made for each object anew, or that it has none and is passed by its name."""
    return _Field(factory)


class _Signature:
    """What `inspect.signature`, and so `help`, says of a class with fields: made when it is asked for."""

    def __get__(self, _: object, cls: type[_Fields]) -> object:
        import inspect  # noqa: PLC0415 - 4 ms, and few programs ask

        kinds = {name: kind for base in reversed(cls.__mro__) for name, kind in inspect.get_annotations(base).items()}
        parameters = []
        for name in cls.__match_args__:
            default = cls._defaults.get(name, cls._fields.get(name, inspect.Parameter.empty))
            by_name = isinstance(default, _Field) and default.factory is None
            kind = inspect.Parameter.KEYWORD_ONLY if by_name else inspect.Parameter.POSITIONAL_OR_KEYWORD
            shown = inspect.Parameter.empty if by_name else default
            parameters.append(inspect.Parameter(name, kind, default=shown, annotation=kinds[name]))
        return inspect.Signature(parameters)


class _Fields:
    __signature__ = _Signature()
    __match_args__: ClassVar[tuple[str, ...]] = ()
    _names: ClassVar[frozenset[str]] = frozenset()
    _defaults: ClassVar[dict[str, Any]] = {}
    _fields: ClassVar[dict[str, _Field]] = {}

    def __init_subclass__(cls) -> None:
        # Annotations are text here, and types in a module that evaluates them.
        own = [name for name, kind in cls.__annotations__.items() if "ClassVar" not in str(kind)]
        given = {name: vars(cls)[name] for name in own if name in vars(cls)}
        said = {name: default for name, default in given.items() if isinstance(default, _Field)}
        cls.__match_args__ = (*cls.__match_args__, *own)  # type: ignore[misc]  # mypy knows them without
        cls._names = frozenset(cls.__match_args__)
        cls._defaults = {**cls._defaults, **{name: given[name] for name in given.keys() - said.keys()}}
        cls._fields = {**cls._fields, **said}

    def __init__(self, *values: Any, **named: Any) -> None:
        fields, state = self.__match_args__, vars(self)
        state.update(self._defaults)
        state.update(zip(fields, values, strict=False), **named)
        for name, said in self._fields.items():
            if name not in state and said.factory is not None:
                state[name] = said.factory()
        twice = named.keys() & fields[: len(values)] if named and values else ()
        if state.keys() != self._names or twice or len(values) > len(fields):
            raise TypeError(f"{type(self).__name__} takes {', '.join(fields)}; not {values!r:.200} and {named!r:.200}")
        self._check()

    def _check(self) -> None:
        """Raise what is wrong with the fields."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by their names."""
        state = vars(self)
        return {name: state[name] for name in self.__match_args__}

    def replace(self, **changes: Any) -> Self:
        """Return another one, some of whose fields are others."""
        return type(self)(**{**self.as_dict(), **changes})

    __replace__ = replace  # copy.replace calls this (Python 3.13)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"


@dataclass_transform(field_specifiers=(field,))
class Struct(_Fields):
    """May be changed. Two of them are never equal."""


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Value(_Fields):
    """Cannot be changed. It is equal to those of its class whose fields are equal."""

    def __eq__(self, other: object) -> bool:
        return self.as_dict() == other.as_dict() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().values()))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name!r} of a {type(self).__name__} cannot be set: `replace` returns another one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name!r} of a {type(self).__name__} cannot be deleted")


def at_least(bound: float, **named: float) -> None:
    """Raise ValueError for what is below a bound; it says the name."""
    for name, value in named.items():
        if not value >= bound:
            raise ValueError(f"{name!r} must be >= {bound}: {value}")


def above_zero(**named: float) -> None:
    """Raise ValueError for what is not above 0; it says the name."""
    for name, value in named.items():
        if not value > 0:
            raise ValueError(f"{name!r} must be > 0: {value}")


def above_zero_or_none(**named: float | None) -> None:
    """Raise ValueError for a number that is not above 0; it says the name."""
    for name, value in named.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name!r} must be > 0, or None: {value}")
