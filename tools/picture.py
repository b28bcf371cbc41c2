"""Draws docs/fault.svg, the picture in README.md: the way of one page fault.

python tools/picture.py
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

TARGET = Path(__file__).parent.parent / "docs" / "fault.svg"
WIDTH, HEIGHT = 960, 320
INK, GRAY, BLUE, ORANGE, TEAL = "#1f2933", "#7b8794", "#2f6fb3", "#d9730d", "#2a9d8f"
PAPER, SHADE, EMPTY = "#ffffff", "#f5f7fa", "#eef1f4"

# On a dark page.
DARK = "".join(
    f'{element}[{what}="{light}"] {{ {what}: {dark} }}'
    for element, what, light, dark in (
        ("rect", "fill", PAPER, "#131416"),
        ("rect", "fill", SHADE, "#1f2226"),
        ("rect", "fill", EMPTY, "#2b2f35"),
        ("rect", "stroke", INK, "#9aa5b1"),
        ("text", "fill", INK, "#e4e7eb"),
        ("text", "fill", GRAY, "#9aa5b1"),
    )
)

# The region's pages, row by row: # is present, . is missing, x is the page that a thread touches.
PAGES = (
    "####..........",
    "....##........",
    "..........x...",
    "..............",
    "#..........###",
)


class Drawing:
    """Collects SVG elements."""

    def __init__(self) -> None:
        self._elements: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, *, fill: str = PAPER, stroke: str = INK) -> None:
        """Draw a rectangle."""
        self._elements.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 14,
        color: str = INK,
        anchor: str = "middle",
        weight: int = 400,
    ) -> None:
        """Write one line."""
        self._elements.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}" font-weight="{weight}">'
            f"{escape(words)}</text>"
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float, color: str) -> None:
        """Draw an arrow."""
        self._elements.append(
            f'<path d="M{x} {y} L{to_x} {to_y}" stroke="{color}" stroke-width="2" fill="none"'
            f' marker-end="url(#{color[1:]})"/>'
        )

    def step(self, x: float, y: float, number: int, color: str) -> None:
        """Draw a number in a circle."""
        self._elements.append(f'<circle cx="{x}" cy="{y}" r="11" fill="{color}"/>')
        self.text(x, y + 5, str(number), color=PAPER, weight=700)

    def svg(self) -> str:
        """Return the file."""
        heads = "".join(
            f'<marker id="{color[1:]}" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
            for color in (ORANGE, BLUE, TEAL)
        )
        return "\n".join(
            [
                (
                    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
                    ' font-family="Helvetica, Arial, sans-serif" role="img">'
                ),
                "<title>A thread touches a missing page; the pager fetches it, and the thread goes on.</title>",
                f"<defs>{heads}</defs>",
                f"<style>@media (prefers-color-scheme: dark) {{{DARK}}}</style>",
                f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
                *self._elements,
                "</svg>",
                "",
            ]
        )


def pages(drawing: Drawing, x: float, y: float, size: float) -> None:
    """Draw the region, page by page."""
    fills = {"#": TEAL, ".": EMPTY, "x": ORANGE}
    for row, line in enumerate(PAGES):
        for column, kind in enumerate(line):
            drawing.box(x + column * size, y + row * size, size - 2, size - 2, fill=fills[kind], stroke="none")


def draw() -> str:
    """Return the picture as SVG."""
    drawing = Drawing()
    drawing.box(20, 20, 290, 220)
    drawing.text(165, 44, "your process", size=16, weight=700)
    drawing.text(165, 66, "any thread, GIL held or not", color=GRAY)
    drawing.text(165, 96, "weights[123_456_789]", size=15, color=ORANGE)
    pages(drawing, 39, 122, 18)
    drawing.text(165, 230, "a Region; it may exceed memory", size=13, color=GRAY)

    drawing.box(410, 20, 110, 220, fill=SHADE)
    drawing.text(465, 44, "Linux", size=16, weight=700)
    drawing.text(465, 66, "userfaultfd", color=GRAY)

    drawing.box(620, 20, 130, 220)
    drawing.text(685, 44, "the pager", size=16, weight=700)
    for y, words in ((66, "an asyncio loop"), (112, "readahead,"), (132, "retries, limits,"), (152, "your coroutines")):
        drawing.text(685, y, words, color=GRAY)

    drawing.box(830, 20, 110, 220)
    drawing.text(885, 44, "the bytes", size=16, weight=700)
    for y, words in ((76, "http(s)"), (98, "s3, gs, az"), (120, "a file"), (142, "memory"), (164, "computed")):
        drawing.text(885, y, words, color=GRAY)

    drawing.arrow(310, 92, 404, 92, ORANGE)
    drawing.step(357, 75, 1, ORANGE)
    drawing.arrow(520, 92, 614, 92, BLUE)
    drawing.step(567, 75, 2, BLUE)
    drawing.arrow(750, 92, 824, 92, BLUE)
    drawing.step(787, 75, 3, BLUE)
    drawing.arrow(830, 190, 756, 190, TEAL)
    drawing.arrow(620, 190, 526, 190, TEAL)
    drawing.step(573, 173, 4, TEAL)
    drawing.arrow(410, 190, 316, 190, TEAL)
    drawing.step(363, 173, 5, TEAL)

    steps = (
        (20, 272, 1, ORANGE, "A thread touches a missing page."),
        (20, 302, 2, BLUE, "The pager reads the page fault."),
        (350, 272, 3, BLUE, "It reads the page and its neighbors."),
        (350, 302, 4, TEAL, "It copies them into the region."),
        (680, 272, 5, TEAL, "The thread wakes and goes on."),
    )
    for x, y, number, color, words in steps:
        drawing.step(x + 11, y, number, color)
        drawing.text(x + 30, y + 5, words, anchor="start")
    return drawing.svg()


if __name__ == "__main__":
    TARGET.write_text(draw())
