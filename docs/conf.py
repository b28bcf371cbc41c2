"""How the documentation is built, without a network: `python -m sphinx -W -n docs OUTPUT`, with the group `docs`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sphinx.ext import napoleon
from sphinx.util.nodes import make_refnode

import aiouffd

if TYPE_CHECKING:
    from pathlib import Path

    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "aiouffd"
author = "The aiouffd developers"
project_copyright = author
version = release = aiouffd.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_llm.txt",
    "notfound.extension",
]
exclude_patterns = ["_build"]
default_role = "py:obj"  # what docstrings have in backquotes
html_theme = "furo"
smartquotes_action = "D"  # dashes: docstrings quote values
html_title = f"aiouffd {release}"
html_use_index = False  # the search finds names
html_static_path = ["_static"]
html_css_files = ["custom.css"]
pygments_dark_style = "github-dark"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"

# Names of Python that signatures and docstrings may mention are in a text file, `name kind page` each, so that a build
# asks no network. One that it lacks is a warning (-n): add it.
intersphinx_mapping = {"python": ("https://docs.python.org/3", "python.inv")}
nitpick_ignore = [
    ("py:class", name)
    for name in (
        *("array", "Buffer", "Future", "concurrent.futures._base.Future"),  # what modules import by these short names
        *("Settings", "SocketFile", "Session", "aiouffd.server.session.Session", "aiouffd.server.clients.Client"),
        "aiouffd.server.services.Settings",
        *(
            "Capturing",
            "Answers",
            "Order",
            "RecordedPages",
            "aiouffd.server.successor.Left",
            "TracerProvider",
            "MeterProvider",
        ),
    )  # and bases and types of attributes that are no public names
]

# llms.txt, and each page as Markdown with what autodoc has written into it.
llms_txt_description = "An asyncio framework for Linux userfaultfd: memory that fills itself on first touch."
llms_txt_full_build = True
llms_txt_nested_enabled = False
llms_txt_suffix_mode = "append"
llms_txt_suppress_unknown_node_warnings = ["abbreviation"]  # the star of parameters by keyword

notfound_urls_prefix = "/"
notfound_context = {
    "title": "There is no such page",
    "body": (
        "<h1>There is no such page</h1>"
        '<p>Search for what you need, or begin with <a href="/tutorial/lazy-array.html">a lazy array</a>.</p>'
    ),
}

_SETUP = re.compile(r"^<!-- setup\n.*?^-->\n+", re.DOTALL | re.MULTILINE)
_PAGES = {
    "ARCHITECTURE.md": "development/architecture.md",
    "CHANGELOG.md": "reference/changelog.md",
    "CONTRIBUTING.md": "development/contributing.md",
    "SECURITY.md": "development/security.md",
}
_GOOGLE = napoleon.Config(
    napoleon_use_ivar=True,
    napoleon_attr_annotations=False,
    napoleon_custom_sections=[("Raises on entering", "params_style")],
)


def _read_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read Google's sections. Not by napoleon's own hook, which takes `Bytes: ...` of a property for its type."""
    kind = "method" if what in ("property", "attribute", "data") else what
    lines[:] = str(napoleon.GoogleDocstring(lines, _GOOGLE, app, kind, name, obj, options)).splitlines()


def _find(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Element) -> Element | None:
    """Find what is public under a shorter name than its module's, and `Name(...)`; other code is no reference."""
    if node["refdomain"] != "py":
        return None
    objects = env.domains.python_domain.objects
    path = re.match(r"[\w.]*", node["reftarget"])[0].split(".")
    for name in (".".join(path), path[-1]):
        if (found := objects.get(f"aiouffd.{name}")) is not None:
            return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, text)
        if node["reftype"] == "obj":
            break
    return text if node["reftype"] == "obj" else None


def _drop_setup(_app: Sphinx, _page: str, content: list[str]) -> None:
    """Leave out the code that only the tests run."""
    content[0] = _SETUP.sub("", content[0])


def _relink(_app: Sphinx, _path: Path, _page: str, content: list[str]) -> None:
    """Let links of documents outside of docs/ lead to pages, where there are some."""

    def page_of(found: re.Match[str]) -> str:
        target = found[1]
        inside = _PAGES.get(target) or target.removeprefix("docs/")
        return f"](/{inside}" if inside != target else f"](/../{target}"

    content[0] = re.sub(r"\]\((?!\w+://|#)([\w./-]+)", page_of, content[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _drop_setup)
    app.connect("include-read", _relink)
    app.connect("autodoc-process-docstring", _read_docstring)
    app.connect("missing-reference", _find)
