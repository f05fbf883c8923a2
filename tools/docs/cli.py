"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import re
from typing import Any

from typer.main import get_command


def commands() -> dict[str, tuple[Any, Any]]:
    """Every command with its context, by the words that call it (``mor data prepare``)."""
    from mor.cli.app import app

    found: dict[str, tuple[Any, Any]] = {}

    def walk(command: Any, context: Any) -> None:
        if not hasattr(command, "list_commands"):
            found[context.command_path] = (command, context)
            return
        for name in command.list_commands(context):
            # `resolve_command` gives the command itself where `get_command` gives a stand-in.
            _, inner, _ = command.resolve_command(context, [name])
            walk(inner, inner.context_class(inner, info_name=name, parent=context))

    root = get_command(app)
    walk(root, root.context_class(root, info_name="mor"))
    return found


def cli_page() -> str:
    """Markdown: each command with its arguments, options and defaults."""
    parts = [
        "# Command line",
        "",
        "Every command with its arguments, options and defaults, as `mor COMMAND --help` prints "
        "them. A mistake is answered by one sentence, and the exit code is 2; a run that was "
        "asked to stop ends with 130.",
    ]
    for words, (command, context) in commands().items():
        parts += ["", f"## {words}", "", clean(command.help or command.short_help or "")]
        usage = " ".join(command.collect_usage_pieces(context))
        parts += ["", "```", f"{words} {usage}", "```", ""]
        rows = [row for p in command.get_params(context) if (row := describe(p, context))]
        if rows:
            parts += ["| | |", "|---|---|", *rows]
    return "\n".join(parts) + "\n"


def describe(parameter: Any, context: Any) -> str | None:
    """One row of the table; None for ``--help`` and for what help does not show."""
    record = parameter.get_help_record(context)
    if record is None or parameter.name == "help":
        return None
    names, text = record
    return f"| `{cell(names)}` | {cell(clean(text))} |"


def clean(text: str) -> str:
    """Help without the markup of the terminal, paragraphs kept."""
    text = re.sub(r"\[/?(?:bold|italic|dim)\]", "", text)
    return re.sub(r"[ \t]*\n[ \t]*", "\n", text).strip()


def cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
