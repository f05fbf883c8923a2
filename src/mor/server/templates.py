"""Chat templates, tried once before anybody asks."""

from __future__ import annotations

from typing import Any

from mor.errors import MorError

_WORDS = "mor-tries-this", "mor-tries-that"


def _chats(word: str) -> list[list[dict[str, str]]]:
    asked = {"role": "user", "content": word}
    told = {"role": "system", "content": word}
    return [[asked], [told, asked], [asked, {"role": "assistant", "content": word}, asked]]


def check_template(tokenizer: Any, template: str | None, name: str) -> str | None:
    """The chat template that a server uses, found to work.

    Args:
        tokenizer: of the model; its own template is taken where ``template`` is None.
        template: Jinja text in place of it.
        name: of the template, for messages.

    Returns:
        The template; None where there is none.

    Raises:
        MorError: it is empty, no Jinja, refuses every simple chat, or writes nothing of what was
            said. One that refuses some chats is fine.
    """
    if template is None:
        own = getattr(tokenizer, "chat_template", None)
        if not own:
            return None
        template = own["default"] if isinstance(own, dict) and "default" in own else own
    if not isinstance(template, str):
        raise MorError(f"{name} is no single text; give one with --chat-template FILE")
    if not template.strip():
        raise MorError(f"{name} is empty; leave it out or give a Jinja template")
    said, why = False, ""
    for chats in zip(*map(_chats, _WORDS), strict=True):
        try:
            texts = [
                tokenizer.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=True
                )
                for chat in chats
            ]
        except Exception as error:  # a template raises whatever it likes
            why = why or describe(error)
            continue
        said = said or texts[0] != texts[1]
        if said:
            return template
        why = "what is said in a chat is not in the text"
    raise MorError(f"{name} does not work: {why}; correct it, or use --chat-template FILE")


def describe(error: Exception) -> str:
    """What a template says is wrong, in one line."""
    line = getattr(error, "lineno", None)
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return text if line is None else f"line {line}: {text}"
