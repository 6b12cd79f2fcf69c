"""The documentation site: `make docs` builds it into build/site, offline, warnings as errors.

The pages are plain Markdown that reads well without being built. What belongs to the repository as a whole (README,
BENCHMARKS, CONTRIBUTING and the like) stays where it is, and is included by a page of one directive.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sphinx.errors import ExtensionError

import rconv_fast

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parent
# Files outside docs/ that pages link to, and the page that shows each.
SHOWN_BY = {
    "README.md": "index.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "citation.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples": "gallery.md",
}

project = "rconv-fast"
author = "the rconv-fast authors"
version = release = rconv_fast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["paper", "gallery"]

html_theme = "furo"
html_title = f"rconv-fast {version}"
html_show_sourcelink = html_copy_source = False
html_show_copyright = html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style = "friendly"
highlight_language = "none"  # blocks without a language are shells and formulas

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # an included page may begin at another level

default_role = "code"
autodoc_mock_imports = ["flwr", "opacus"]  # extras that the build need not have
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "none"  # the docstrings say the types, with shapes
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def on_the_site(text: str, page: PurePosixPath) -> str:
    """Markdown with the links of a file of the repository (`page`, from its root) turned to the site's pages."""

    def turned(match: re.Match[str]) -> str:
        target, hash_, anchor = match.group(1).partition("#")
        if not target or "://" in target:
            return match.group()
        inside = _from_root(page.parent / target)
        shown = SHOWN_BY.get(inside) or SHOWN_BY.get(inside.partition("/")[0])
        return f"](/{shown or inside.removeprefix('docs/')}{hash_}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", turned, text)


def _from_root(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def turn_page(_: Sphinx, name: str, content: list[str]) -> None:
    """Turn the links of a page of docs/."""
    content[0] = on_the_site(content[0], PurePosixPath("docs", f"{name}.md"))


def turn_included(_: Sphinx, path: Path, __: str, content: list[str]) -> None:
    """Turn the links of a file that a page includes."""
    inside = (DOCS / path).resolve().relative_to(DOCS.parent.resolve())
    content[0] = on_the_site(content[0], PurePosixPath(inside.as_posix()))


def number_references(_: Sphinx, __: str, ___: str, ____: object, _____: object, lines: list[str]) -> None:
    """Turn a docstring's numbered references into a list: footnotes would be numbered once a page."""
    lines[:] = [re.sub(r"\[(\d+)\]_", r"[\1]", re.sub(r"^\.\. \[(\d+)\] ", r"\1. ", line)) for line in lines]


def require_offline(app: Sphinx, exception: Exception | None) -> None:
    """Refuse a site whose pages would fetch something from elsewhere when they are read."""
    if exception is None:
        for page in Path(app.outdir).rglob("*.html"):
            fetched = re.search(
                r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["'](?:https?:)?//[^>]*""", page.read_text()
            )
            if fetched:
                raise ExtensionError(f"{page.name} must need no network, got {fetched.group()}")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", turn_page)
    app.connect("include-read", turn_included)
    app.connect("autodoc-process-docstring", number_references)
    app.connect("build-finished", require_offline)
