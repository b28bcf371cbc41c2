"""A recording of first touches as a picture: where in the source, and when, in order of the touches."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Final

from aiouffd.report.words import several, size

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["heat_map"]

_COLUMNS: Final = 96
_ROWS: Final = 64
_SHADES: Final = 8
_CELL: Final = 8  # of the picture's units
_LEFT: Final = 90
_TOP: Final = 30
_STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#59636e}.f{fill:none;stroke:#d1d9e0}.h{fill:#1f77b4}"
    "@media(prefers-color-scheme:dark){text{fill:#9198a1}.f{stroke:#3d444d}.h{fill:#4493d8}}"
)


def heat_map(offsets: Sequence[int], page_size: int, length: int, name: str) -> str:
    """Return an SVG: the order of the touches to the right, offsets downwards, the darker the more pages.

    Args:
        offsets: of pages, in the order of their first touch.
        page_size: bytes.
        length: of the source.
        name: what it is of.
    """
    columns = min(_COLUMNS, max(len(offsets), 1))
    step = max(-(-length // _ROWS), page_size)
    cells = Counter((place * columns // len(offsets), offset // step) for place, offset in enumerate(offsets))
    most = max(cells.values(), default=1)
    width, height = _COLUMNS * _CELL, _ROWS * _CELL
    broad = width / columns
    drawn = [
        f'<rect class="h" x="{_LEFT + column * broad:.6g}" y="{_TOP + row * _CELL}" width="{broad:.6g}"'
        f' height="{_CELL}" fill-opacity="{-(-count * _SHADES // most) / _SHADES:.3g}"/>'
        for (column, row), count in sorted(cells.items())
    ]
    said = f"{several(len(offsets), 'page')} of {page_size:,} bytes, {size(len(offsets) * page_size)} of {size(length)}"
    label = escape(f"{name}: {said}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" width="{_LEFT + width + 20}"'
        f' height="{_TOP + height + 40}"><title>{label}</title><style>{_STYLE}</style>'
        f'<text x="{_LEFT}" y="{_TOP - 10}">{label}</text>'
        f'<text x="{_LEFT - 8}" y="{_TOP + 12}" text-anchor="end">0</text>'
        f'<text x="{_LEFT - 8}" y="{_TOP + height}" text-anchor="end">{size(length)}</text>'
        f'<text x="{_LEFT}" y="{_TOP + height + 22}">the first touch</text>'
        f'<text x="{_LEFT + width}" y="{_TOP + height + 22}" text-anchor="end">the last one</text>'
        f"{''.join(drawn)}"
        f'<rect class="f" x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}"/></svg>\n'
    )
