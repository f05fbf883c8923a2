"""What MkDocs cannot do by itself: generated reference pages, and links that leave ``docs/``.

``mkdocs.yml`` names this file under ``hooks``. Pages are made in memory; nothing is written into
``docs/``. GitHub shows the same Markdown files, so links are written for GitHub:

- ``CONTRIBUTING.md`` and ``CHANGELOG.md`` of the repository become pages of the site;
- a link to a file below ``src/mor`` leads to the place of the API reference that describes it;
- a link to any other file of the repository keeps its text and loses its address.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.docs.api import api_pages, page_of_module  # noqa: E402
from tools.docs.cli import cli_page  # noqa: E402
from tools.docs.fields import config_page, recipe_page  # noqa: E402

# Files of the repository that are pages of the site, too.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_ROLE = re.compile(r":(?:mod|class|meth|func|attr|data|exc):<code>([^<]+)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to those of ``docs/``."""
    pages = api_pages(ROOT / "src")
    pages["reference/cli.md"] = cli_page()
    pages["reference/recipe.md"] = recipe_page()
    pages["reference/config.md"] = config_page()
    for name, page in PAGES.items():
        pages[page] = (ROOT / name).read_text("utf-8")
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page that lead out of ``docs/``."""
    where = page.file.src_uri
    source = {page: name for name, page in PAGES.items()}.get(where, f"docs/{where}")
    return _LINK.sub(lambda match: rewrite_link(match, source, where), markdown)


def rewrite_link(match: re.Match[str], source: str, page: str) -> str:
    """One Markdown link as the site needs it.

    Args:
        match: of the link.
        source: the file that holds it, from the root of the repository.
        page: the page of the site that is made from it.
    """
    image, text, target = match.groups()
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    path, _, anchor = target.partition("#")
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    hash_ = f"#{anchor}" if anchor else ""
    if wanted.startswith("docs/"):
        found = wanted.removeprefix("docs/")
    elif wanted in PAGES:
        found = PAGES[wanted]
    elif wanted.startswith("src/mor/") and wanted.endswith(".py"):
        module = wanted.removeprefix("src/").removesuffix(".py").replace("/", ".")
        module = module.removesuffix(".__init__")
        found, hash_ = page_of_module(module, ROOT / "src"), f"#{module}"
    else:
        return text
    return f"{image}[{text}]({posixpath.relpath(found, posixpath.dirname(page) or '.')}{hash_})"


def on_page_content(html: str, **_: Any) -> str:
    """Show ``:class:`Name``` of a docstring as code that leads to what it names, where it can."""

    def shown(match: re.Match[str]) -> str:
        name = match[1].removeprefix("~")
        _, angle, address = name.partition("&lt;")
        target = address.removesuffix("&gt;") if angle else name
        label = name.partition(" &lt;")[0] if angle else name
        return f'<autoref identifier="{target}" optional><code>{label}</code></autoref>'

    return _ROLE.sub(shown, html)
