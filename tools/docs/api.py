"""The API reference: one page per package of ``mor``, filled by mkdocstrings from the source."""

from __future__ import annotations

from pathlib import Path

# Commands have a reference of their own; recipes are YAML.
_LEFT_OUT = {"cli", "recipes"}


def modules(source: Path) -> list[str]:
    """Dotted names of all modules of ``mor`` that are documented, packages before their modules.

    Args:
        source: the folder that holds ``mor``.
    """
    names = []
    for path in sorted((source / "mor").rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if len(parts) > 1 and parts[1] in _LEFT_OUT:
            continue
        names.append(".".join(parts))
    return sorted(names, key=lambda name: name.split("."))


def page_of_module(module: str, source: Path) -> str:
    """The page, from the root of the site, that describes ``module``."""
    parts = module.split(".")
    is_package = len(parts) > 1 and (source / "mor" / parts[1]).is_dir()
    return f"reference/api/{parts[1] if is_package else 'mor'}.md"


def api_pages(source: Path) -> dict[str, str]:
    """Markdown of every page by its path; ``:::`` is mkdocstrings' word for "describe this"."""
    pages: dict[str, list[str]] = {}
    for module in modules(source):
        page = pages.setdefault(page_of_module(module, source), [])
        is_package = (source / Path(*module.split("."))).is_dir()
        if not page:
            page.append(f"# {module}\n")
        page.append(f"::: {module}\n")
        # What a package offers is described where it is defined.
        page.append("    options:\n      members: false\n" if is_package else "")
    return {path: "\n".join(parts) for path, parts in pages.items()}
