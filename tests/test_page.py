"""`report.page`: the HTML of runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

from hypothesis import given
from reported import MIB, anything, run_of

from aiouffd.report.page import page

if TYPE_CHECKING:
    from aiouffd.report.run import Run

SHOWN: dict[str, Any] = {
    "faults": 1234,
    "pages_fault": 1200,
    "bytes_fetched": 3 * MIB,
    "resident": 16 * MIB,
    "source_reads": 10,
    "source_ns": 10 * 38_000_000,
    "source_retries": 4,
    "latency": {20: 1000, 26: 234},
    "film": [(0.0, [0, 0]), (5.0, [100, 0])],
    "cache": {"hits": 5, "misses": 5},
    "errors": ["<gone> & lost"],
}
ROWS = {"faults": [1000, 0, 234], "pages_fault": [1000, 0, 200], "restarts": [0, 0, 1], "source_retries": [4, 0, 0]}


class Elements(HTMLParser):
    """The tags of a page and its text; they close in order."""

    empty = ("meta", "link", "br", "img", "tr", "td")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == ["html"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        self.seen.append((tag, dict(attrs)))
        if tag not in self.empty:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element that closes itself."""
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Close one: the last that was opened."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note text."""
        self.text += data


def test_it_says_what_a_run_was_like() -> None:
    """Advice, figures, pictures, errors and all counts."""
    text = Elements(page([run_of(ROWS, **SHOWN)])).text
    for said in (
        *("Far()", "Pager()", "python program.py", "the block was left", "1,234", "16.0 MiB (25 %)", "3.0 MiB"),
        *("50 % within 1.0 ms, 90 % within 67 ms", "further tries after a failure (4 of 10, at 0 ns to 100 ms)"),
        *("0 ns: 1,000 faults", "200 ms: the worker died and was replaced", "38 ms", "cache: hits", "<gone> & lost"),
        *("25 % of the region was present at the end", "524 us to 1.0 ms: 1,000 faults", "source_retries"),
    ):
        assert said in text, said
    assert "prefetch" not in "".join(re.findall(r'class="key">.*?</span>', page([run_of(ROWS, **SHOWN)])))


def test_a_handler_has_calls_and_no_reads() -> None:
    """Its errors are counted beside those of a source."""
    text = Elements(page([run_of(is_handler=True, source_reads=3, handler_errors=2)])).text
    assert "calls of the handler3" in text
    assert "failed for good2" in text


@given(anything())
def test_any_run_is_shown_and_nothing_in_it_is_markup(run: Run) -> None:
    """Tags close in order, no script gets in, and no other file is asked for."""
    elements = Elements(page([run, run]))
    assert "script" not in {tag for tag, _ in elements.seen}
    asked = [value for _, given in elements.seen for name, value in given.items() if name in ("src", "href")]
    assert all(value is not None and value.startswith("data:") for value in asked)


def test_of_too_many_runs_those_with_the_most_faults_are_shown() -> None:
    """In their order; the page says so."""
    text = Elements(page([run_of(faults=number, source=f"S{number}.") for number in range(150)])).text
    assert "150 runs, of which 100 are shown" in text
    assert re.findall(r"S(\d+)\.", text) == [str(number) for number in range(50, 150)]
    assert "3 runs." in Elements(page([run_of()] * 3)).text
