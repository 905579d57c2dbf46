"""The documentation site: ``sphinx-build -W --keep-going -b html docs site``. Why Sphinx: decisions/0007."""

from __future__ import annotations

import inspect
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the reference is that of this tree

from vtoken import __version__  # noqa: E402  # after the path

project = "vtoken"
author = project_copyright = "The vtoken authors"
version = release = __version__
html_title = f"vtoken {__version__}"
pygments_dark_style = "github-dark"  # the theme's own underlines modules and classes, as if they were links

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["examples/*/*[!E].md", "examples/*/tests", "examples/*/.*", "examples/*/data"]
html_theme = "furo"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["vtoken.css"]
if (
    "GITHUB_REPOSITORY" in os.environ
):  # where the workflow that publishes the site runs: links to the repository
    _REPOSITORY = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
    html_theme_options = {
        "source_view_link": f"{_REPOSITORY}/blob/main/docs/{{filename}}",
        "top_of_page_buttons": ["view"],
        "footer_icons": [{"name": "Repository", "url": _REPOSITORY, "html": "Repository", "class": ""}],
    }
html_extra_path = ["llms.txt"]  # names the pages' sources, which the site holds under _sources/

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False

nitpicky = True  # what a docstring refers to is there
nitpick_ignore_regex = [
    # Known, but described elsewhere: no other site is asked while this one is built.
    ("py:.*", r"(?:typing|collections|contextlib|datetime|enum|logging|os|pathlib|types|uuid)\..*"),
    ("py:.*", r"(?:aiohttp|anyio|fastapi|litestar|opentelemetry|prometheus_client|starlette)\..*"),
    # Names that are imported for type checkers only, and so are not resolved.
    ("py:.*", r"timedelta|HTTPConnection|InitPlugin|Middleware|web\..*|\w+Provider|CollectorRegistry"),
    # Aliases and helpers that are shown as they are.
    (
        "py:.*",
        r"AsyncConnectionPool|InvalidStatus|Handler|Render|Duration|Reason|vtoken\.inputs\.(?:Unset|Wildcard)",
    ),
    ("py:.*", r"vtoken\.(?:sync|subject)\.[PT]|vtoken\.policy\.\w+Options"),
]

_PLACES = (
    "vtoken.",
    "vtoken.backend.",
    "vtoken.backend.TokenBackend.",  # where a backend's own methods say no more than the protocol
    "vtoken.config.",
    "vtoken.contrib.fastapi.",
    "vtoken.testing.",
)
_MOVED = {
    "README.md": "/index.md",
    "CHANGELOG.md": "/project/changelog.md",
    "CONTRIBUTING.md": "/project/contributing.md",
    "SECURITY.md": "/project/reporting.md",
}
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)]*)?\)")
_INCLUDE = re.compile(r"^```\{include\} ../../(?P<name>[A-Z]+\.md)\n```$", re.MULTILINE)


def _site_links(_: Any, docname: str, source: list[str]) -> None:
    """Let links that work in the repository work on the site: to files beside ``docs``, and to folders."""
    folder = posixpath.dirname(docname)
    included = _INCLUDE.search(source[0])
    if included:  # a page of the repository's root
        source[0], folder = (ROOT / included["name"]).read_text(encoding="utf-8"), ".."

    def moved(found: re.Match[str]) -> str:
        text, anchor = found["text"], found["anchor"] or ""
        target = posixpath.normpath(posixpath.join(folder, found["target"])).removeprefix("../docs/")
        if target.removeprefix("../") in _MOVED:
            return f"[{text}]({_MOVED[target.removeprefix('../')]}{anchor})"
        for page in ("index.md", "README.md"):
            if (ROOT / "docs" / target / page).is_file():
                return f"[{text}](/{target}/{page})"
        if (ROOT / "docs" / target).is_file():
            return f"[{text}](/{target}{anchor})"
        if (ROOT / "docs" / target).exists():
            return text  # code, which the site does not hold
        return found[0]

    source[0] = _LINK.sub(moved, source[0])


def _plain_first_line(_: Any, what: str, *arguments: Any) -> None:
    """Keep napoleon from taking "When it was made: ..." for a type and a description."""
    lines: list[str] = arguments[-1]
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()  # a named tuple's field that has no words of its own
    if what in {"attribute", "data", "property"} and lines:
        lines[:0] = ["..", ""]  # an empty comment: blank lines it skips


def _readable_signature(_: Any, what: str, *arguments: Any) -> tuple[str, str | None] | None:
    """Leave out the types of a dataclass whose defaults have no name: nothing could be linked in them."""
    obj, signature = arguments[1], arguments[3]
    if what != "class" or "<" not in (signature or ""):
        return None
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for parameter in inspect.signature(obj).parameters.values()
    ]
    shown = str(inspect.Signature(parameters))
    return re.sub(r"<[^>]*>", "...", shown), None


def _elsewhere(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Find what a docstring names without its module, or by the module that defines it."""
    if node.get("refdomain") != "py":
        return None
    target: str = node["reftarget"]
    names = {target, *(target.split(".", 2)[2:] if target.startswith("vtoken.") else ())}
    for name in (place + name for place in _PLACES for name in names):
        found = env.domains["py"].resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], name, node, contnode
        )
        if found is not None:
            return found
    return None


def _whole_words(_: Any, doctree: nodes.document) -> None:
    """Mark code of short words, which the stylesheet keeps whole: browsers break ``--url`` at its hyphens."""
    for node in doctree.findall(nodes.literal):
        if all(len(word) <= 20 for word in node.astext().split()):
            node["classes"].append("whole")


def setup(app: Any) -> dict[str, bool]:
    """Register what is ours."""
    app.connect("source-read", _site_links)
    app.connect("autodoc-process-signature", _readable_signature)
    app.connect("autodoc-process-docstring", _plain_first_line, priority=100)
    app.connect("doctree-read", _whole_words)
    app.connect("missing-reference", _elsewhere)
    return {"parallel_read_safe": True}
