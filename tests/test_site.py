"""The documentation as a site: it builds without a warning and without a network, and a browser shows each page.

Needs the dependency groups `docs` and `browser`, and Debian's chromium: `pytest -m site tests/test_site.py`.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from pattern import PAGE, content, peek
from PIL import Image
from reported import run_of
from scenario import play
from served import MIB, Serve, free_port, hand_over

from aiouffd.cli.unix_http import ControlClient
from aiouffd.report.page import page as page_of
from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import ConsoleMessage, Page

pytestmark = pytest.mark.site

ROOT = Path(__file__).parent.parent
PHONE, DESK = 360, 1400
SCHEMES: dict[Literal["light", "dark"], tuple[int, int, int]] = {"light": (31, 119, 180), "dark": (68, 147, 216)}
"""The colour of what is there."""

# What reaches over the window's edge, and in nothing that scrolls. The theme clips it: the page is never too wide.
CUT = """
[...document.querySelectorAll("article *")].filter(one => {
    for (let outer = one.parentElement; outer.tagName != "ARTICLE"; outer = outer.parentElement)
        if (["auto", "scroll"].includes(getComputedStyle(outer).overflowX)) return false;
    return one.getBoundingClientRect().right > innerWidth + 1;
}).map(one => one.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Where user namespaces are allowed, there is no network while it is built."""
    target = tmp_path_factory.mktemp("site")
    alone = ["unshare", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        alone = []
    command = [*alone, sys.executable, "-m", "sphinx", "-W", "-n", "-q", str(ROOT / "docs"), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return target


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a directory, and its 404.html for what is not there."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with the page, as a host of static sites does."""
        body = (Path(self.directory) / "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Be silent."""


@pytest.fixture
def url(site: Path) -> Iterator[str]:
    """Where it is served."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def opened(complaints: list[str], scheme: Literal["dark", "light"] = "light") -> Iterator[Page]:
    """Yield a browser's page; what it complains of is added to `complaints`."""
    from playwright.sync_api import sync_playwright

    def hear(message: ConsoleMessage) -> None:
        if message.type == "error":
            complaints.append(f"{message.location['url']}: {message.text}")

    program = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    assert program is not None, "apt-get install chromium-headless-shell"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": DESK, "height": 800}, color_scheme=scheme)
        page.on("console", hear)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        try:
            yield page
        finally:
            browser.close()


def pages(site: Path) -> list[str]:
    """Return the pages' addresses in the site."""
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))


def test_each_page_is_shown(site: Path, url: str) -> None:
    """No error on the console, no picture that is missing, and nothing that the window's edge cuts off."""
    complaints: list[str] = []
    assert len(pages(site)) > 30
    with opened(complaints) as page:
        for name in pages(site):
            page.goto(url + name)
            for width in (PHONE, DESK):
                page.set_viewport_size({"width": width, "height": 800})
                complaints += [f"{name}: {cut} in a window of {width}" for cut in page.evaluate(CUT)]
            if page.evaluate("[...document.images].some(one => !one.naturalWidth)"):
                complaints.append(f"{name} lacks a picture")
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_is_shown(tmp_path: Path, scheme: Literal["light", "dark"]) -> None:
    """By itself, from a file, narrow and wide: with what is long, and what would be markup; nothing is asked for."""
    long = "<script>alert(1)</script>" * 20
    lasting = {"faults": list(range(200)), "pages_fault": [7] * 200, "restarts": [0, 1] * 100}
    figures: dict[str, Any] = {
        "faults": 10**18,
        "sequential": 9,
        "source_retries": 5,
        "source_reads": 9,
        "cache": {"hits": 1},
    }
    film = [(at / 10, [at % 101] * 128) for at in range(96)]
    runs = [run_of(), run_of(lasting, source=long, program=long, errors=[long], film=film, latency={47: 1}, **figures)]
    path = tmp_path / "report.html"
    path.write_text(page_of(runs))
    complaints: list[str] = []
    with opened(complaints, scheme) as page:
        page.on("request", lambda request: complaints.append(request.url) if request.url[:5] == "http:" else None)
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(path.as_uri())
        page.click("details summary")
        for width in (PHONE, DESK):
            page.set_viewport_size({"width": width, "height": 800})
            complaints += [f"{cut} in a window of {width}" for cut in page.evaluate(CUT)]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            seen = page.evaluate(
                "[...document.querySelectorAll('.plot > svg, .plot > img')].map(one => one.clientHeight)"
            )
            assert len(seen) == 7
            assert min(seen) > 100
        light, dark = "rgb(255, 255, 255)", "rgb(13, 17, 23)"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (dark if scheme == "dark" else light)
    assert complaints == []


def looked_at(path: str, other: str, slow: str, url: str) -> None:
    """Scenario: three clients, and a browser that looks at them, by day and by night, wide and narrow."""
    one, two, three = (hand_over(each)[0] for each in (path, other, slow))
    for number in range(64):
        peek(one.address + number * PAGE)
    for nth, (scheme, bar) in enumerate(SCHEMES.items(), 1):  # the first page of a URL comes with its size
        complaints: list[str] = []
        with opened(complaints, scheme) as page:
            page.goto(url)
            page.wait_for_selector("#state[data-state=live]")
            page.wait_for_selector("[data-session=one] canvas[aria-label^='25 %']")
            page.wait_for_selector("[data-session=two] canvas")
            peek(three.address + nth * PAGE)
            page.wait_for_selector("[data-session=slow] .hint:text-matches('slow: waited [3-9].. ms for its source')")
            assert page.get_attribute("#sessions tr:first-child", "data-session") == "slow"
            assert "ObjectSource('http://" in page.inner_text("[data-session=slow] small")
            assert page.eval_on_selector_all("#restarts li", "all => all.length") == 1
            counts = page.eval_on_selector_all("#latency meter", "all => all.map(one => one.value)")
            assert sum(counts) >= 64
            assert page.eval_on_selector_all("#happenings li", "all => all.length") >= 4
            box = page.locator("[data-session=one] canvas").bounding_box()
            assert box is not None
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            middle = int(box["y"] + box["height"] / 2)
            there, missing = (picture.getpixel((int(box["x"] + box["width"] * at), middle)) for at in (0.1, 0.9))
            assert there == bar != missing
            page.fill("#wanted", "tw")
            page.wait_for_selector("[data-session=one]", state="detached")
            for number in range(3):
                peek(two.address + (number + 8 * (scheme == "dark")) * PAGE)
            share = 2.3 if scheme == "dark" else 1.2  # per cent
            page.wait_for_selector(f"[data-session=two] canvas[aria-label^='{share} %']")
            page.set_viewport_size({"width": PHONE, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
            state = page.locator("[data-session=two] td:nth-child(2)").bounding_box()
            assert state is not None
            assert state["x"] + state["width"] <= PHONE
        assert complaints == []


def test_a_server_is_shown_while_it_serves(tmp_path: Path) -> None:
    """What its sessions do, and which memory is there, live; when it has ended, the page says so."""
    image, port = tmp_path / "image", free_port()
    image.write_bytes(content(0, MIB))
    paths = [str(tmp_path / name) for name in ("one", "two", "slow")]
    url = f"http://127.0.0.1:{port}/"
    with (
        serving(tmp_path, "--latency-ms", "300") as far,
        Serve(tmp_path, "--control", tmp_path / "control", "--http", port, socket="") as serve,
    ):
        for path, source in zip(paths, (str(image), str(image), f"{far}/image"), strict=True):
            new = {"name": Path(path).name, "socket": path, "source": source, "readahead": 0}
            ControlClient(tmp_path / "control").ask("POST", "/v1/sessions", new)
        play(looked_at, *paths, url, deadline=120)
        with opened([]) as page:
            page.goto(url)
            page.wait_for_selector("#state[data-state=live]")
            serve.end()
            page.wait_for_selector("#state[data-state=lost]")


class Links(HTMLParser):
    """Collects the addresses that a page leads to, and the places that others can lead to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at an element."""
        given = dict(attrs)
        self.places.add(given.get("id") or "")
        if tag == "a":
            self.targets.add(given.get("href") or "")


def test_each_link_leads_somewhere(site: Path) -> None:
    """To a file of the site, and to a place in it; addresses elsewhere are not asked."""
    found = {name: Links((site / name).read_text()) for name in pages(site)}
    lost = []
    for name, links in found.items():
        for target in links.targets:
            parts = urlsplit(urljoin(f"/{name}", target))
            if parts.scheme or parts.netloc:
                continue
            path = unquote(parts.path)[1:] or "index.html"
            places = found[path].places if path in found else {""}
            if not (site / path).is_file() or unquote(parts.fragment) not in places:
                lost.append((name, target))
    assert lost == []


def test_the_search_finds_what_is_there(url: str) -> None:
    """A class by its name, and a page by a word of it."""
    complaints: list[str] = []
    with opened(complaints) as page:
        for word, target in (("Monitor", "reference/api/monitor.html"), ("SIGBUS", "how-to/sigbus.html")):
            page.goto(f"{url}index.html")
            page.fill(".sidebar-search", word)
            page.press(".sidebar-search", "Enter")
            page.wait_for_selector(f"#search-results a[href*='{target}']")
    assert complaints == []


def test_what_is_not_there_is_a_page_with_its_style(url: str) -> None:
    """At any depth: the addresses in it are absolute."""
    complaints: list[str] = []
    with opened(complaints) as page:
        answer = page.goto(f"{url}how-to/nothing/here.html")
        assert answer is not None
        assert answer.status == 404
        assert page.evaluate("document.styleSheets.length") > 2
        page.click(".sidebar-brand")
        page.wait_for_url(f"{url}index.html")
    assert [one for one in complaints if "404" not in one] == []


def test_the_picture_follows_the_switch(url: str) -> None:
    """The system says light; the reader switches to dark, and the picture is dark."""
    with opened([]) as page:
        page.goto(f"{url}explanation/fault.html")
        assert paper(page) == (255, 255, 255)
        while page.evaluate("document.body.dataset.theme") != "dark":
            page.click(".theme-toggle-content button")
        assert paper(page) == (0x13, 0x14, 0x16)
    with opened([], "dark") as page:
        page.goto(f"{url}explanation/fault.html")
        assert paper(page) == (0x13, 0x14, 0x16)


def paper(page: Page) -> tuple[int, ...]:
    """Return the color of the picture's background."""
    picture = Image.open(io.BytesIO(page.locator("article img").screenshot())).convert("RGB")
    color = picture.getpixel((5, 5))
    assert isinstance(color, tuple)
    return color


def test_models_get_all_of_it(site: Path) -> None:
    """llms.txt names each page as Markdown; the reference has what autodoc wrote, and no code that only tests run."""
    listed = (site / "llms.txt").read_text()
    written = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html.md"))
    assert [name for name in written if f"]({name})" not in listed] == []
    assert len(written) == len(list((ROOT / "docs").rglob("*.md")))
    full = (site / "llms-full.txt").read_text()
    assert "Bring `length` bytes from offset `start` of the region, or many ranges by one request." in full
    assert "setup" not in {line.removeprefix("<!--").strip() for line in full.splitlines()}
