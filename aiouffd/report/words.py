"""Figures as people write them."""

from __future__ import annotations

from typing import Final

__all__ = ["duration", "often", "percent", "several", "size"]

_SIZES: Final = ("bytes", "KiB", "MiB", "GiB", "TiB")
_DURATIONS: Final = ((1e-9, "ns"), (1e-6, "us"), (1e-3, "ms"), (1.0, "s"))


def size(count: float) -> str:
    """Return a number of bytes with its unit: 1.5 MiB."""
    power = 0
    while count >= 1024 and power < len(_SIZES) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.1f} {_SIZES[power]}" if power else f"{count:.0f} {'byte' if count == 1 else 'bytes'}"


def duration(seconds: float) -> str:
    """Return a time with its unit, to two digits or three: 38 ms."""
    if seconds >= 120:
        return f"{seconds / 60:,.0f} min"
    unit, name = next((pair for pair in reversed(_DURATIONS) if seconds >= pair[0]), _DURATIONS[0])
    count = seconds / unit
    return f"{count:.1f} {name}" if count < 10 and name != "ns" else f"{count:.0f} {name}"


def percent(part: float, whole: float) -> str:
    """Return a share: 92 %; what is not nothing is not 0 %."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 1:
        return f"{max(share, 0.01):.2g} %"
    return f"{share:.0f} %"


def several(count: int, one: str, many: str = "") -> str:
    """Return a number of things: 1 page, 2,048 pages. `many`: the plural, where that is not the word with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def often(count: int) -> str:
    """Return how often something was: once, 3 times."""
    return "once" if count == 1 else f"{count:,} times"
