"""Types of command-line options (sizes, rates, seconds, file modes, addresses), and options of several commands."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, TypeAlias

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    _Whole: TypeAlias = click.ParamType[int]
    _HostAndPort: TypeAlias = click.ParamType[tuple[str, int]]
else:  # generic since click 8.3
    _Whole = _HostAndPort = click.ParamType

__all__ = ["Address", "FileMode", "Rate", "Seconds", "Size", "merged_by", "readahead"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Size(_Whole):
    """Bytes, with an optional unit: 65536, 64K, 1G, 1GiB.

    Args:
        least: the smallest value that is accepted.
    """

    name = "size"

    def __init__(self, least: int = 0) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size; write for example 65536, 64K, 256M or 1G", param, ctx)
        size = int(match[1]) * _UNITS[match[2].upper()]
        if size < self._least:
            self.fail(f"{value} is too little; the least is {self._least}", param, ctx)
        return size


class Rate(Size):
    """Bytes per second, or `max`."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; infinity for `max`."""
        return math.inf if value == "max" else float(super().convert(value, param, ctx))


class Seconds(click.FloatRange):
    """A range of seconds. "nan" is refused: it compares as neither inside nor outside."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number of seconds", param, ctx)
        return number


class FileMode(_Whole):
    """Permission bits in octal: 600, 0660."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bits."""
        if isinstance(value, int):
            return value
        if not re.fullmatch(r"0?[0-7]{3}", value):
            self.fail(f"{value!r} is not a file mode; write for example 600 or 660", param, ctx)
        return int(value, 8)


class Address(_HostAndPort):
    """HOST:PORT, or PORT on the loopback interface."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Return host and port."""
        if isinstance(value, tuple):
            return value
        host, _, port = value.rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            example = "127.0.0.1:9100, [::1]:9100 or 9100"
            self.fail(f"{value!r} is not an address; write for example {example}", param, ctx)
        return host.strip("[]") or "127.0.0.1", int(port)


def readahead(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option `--readahead`, which several commands have."""
    return click.option(
        "--readahead",
        type=Size(),
        metavar="BYTES",
        default="2M",
        show_default=True,
        help="The largest window that one fault brings; 0 serves page by page.",
    )(command)


def merged_by(how: str) -> Callable[[Any], Any]:
    """Return the option `--by`, of what keeps a recording with a snapshot; how: its help."""
    return click.option(
        "--by",
        type=click.Choice(["union", "frequency", "last", "replace"]),
        default="union",
        show_default=True,
        help=how,
    )
