"""Pictures as SVG, which stretch to the width of what they are in. Words stand around them, so that they do not."""

from __future__ import annotations

import base64
import struct
import zlib
from bisect import bisect_right
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["bars", "film"]

_HEIGHT: Final = 100
_COLUMNS: Final = 120  # of a film
_INK: Final = (31, 119, 180)
_OPAQUE: Final = bytes(min(255, round(share * 2.55)) for share in range(256))  # of a percentage


def bars(
    stacks: Sequence[Sequence[float]], titles: Sequence[str], name: str, marks: Sequence[tuple[float, str]] = ()
) -> str:
    """Return bars beside each other, from 0 to the largest; each is a stack of parts, of the classes c0, c1 and so on.

    Args:
        stacks: the parts of each bar, from below, at least 0.
        titles: what is shown where one points at a bar.
        name: what the picture shows, for those who cannot see it.
        marks: lines across it: (where, in bars, and a title).
    """
    most = max((sum(stack) for stack in stacks), default=0) or 1.0
    drawn = []
    for index, (stack, title) in enumerate(zip(stacks, titles, strict=True)):
        top = 0.0
        parts = []
        for number, part in enumerate(stack):
            height = part / most * _HEIGHT
            top += height
            if part > 0:
                parts.append(
                    f'<rect class="c{number}" x="{index}" y="{_HEIGHT - top:.4g}" width="1" height="{height:.4g}"/>'
                )
        if parts:
            drawn.append(f"<g><title>{escape(title)}</title>{''.join(parts)}</g>")
    for where, title in marks:
        drawn.append(f'<path class="mark" d="M{where:.4g} 0V{_HEIGHT}"><title>{escape(title)}</title></path>')
    return (
        f'<svg role="img" aria-label="{escape(name)}" viewBox="0 0 {max(len(stacks), 1)} {_HEIGHT}"'
        f' preserveAspectRatio="none">{"".join(drawn)}</svg>'
    )


def film(looks: Sequence[tuple[float, Sequence[int]]], seconds: float, name: str) -> str:
    """Return an image: time to the right, offsets downwards, the darker the more had come.

    Args:
        looks: (seconds, percent of each cell), in order, at least one.
        seconds: where the image ends.
        name: what it shows, for those who cannot see it.
    """
    times = [at for at, _ in looks]
    height = max(1, *(len(shares) for _, shares in looks))
    columns = []
    for index in range(_COLUMNS):
        shares = looks[max(bisect_right(times, (index + 1) * seconds / _COLUMNS) - 1, 0)][1]
        columns.append([shares[row * len(shares) // height] if shares else 0 for row in range(height)])
    rows = [[column[row] for column in columns] for row in range(height)]
    data = base64.b64encode(_png(rows)).decode()
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'


def _png(rows: Sequence[Sequence[int]]) -> bytes:
    """Return a PNG of one color: rows of percents, how opaque each pixel is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"".join(b"\0" + bytes(row).translate(_OPAQUE) for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)  # 8 bits of a palette
    parts = (
        (b"IHDR", header),
        (b"PLTE", bytes(_INK) * 256),
        (b"tRNS", bytes(range(256))),
        (b"IDAT", zlib.compress(pixels, 9)),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts) + chunk(b"IEND", b"")
