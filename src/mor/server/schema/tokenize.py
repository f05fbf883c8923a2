"""Texts and tokens, as vLLM's ``/tokenize`` and ``/detokenize`` take them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mor.server.schema.basics import Strict, Text, TokenId
from mor.server.schema.chats import Turns


class TokenizeText(Strict):
    """``POST /tokenize`` with a text."""

    model: Text | None = Field(None, description="a name of /v1/models")
    prompt: Text
    add_special_tokens: bool | None = Field(None, description="default true: as for completions")
    return_token_strs: bool | None = Field(None, description="the tokens' texts too")


class TokenizeChat(Turns):
    """``POST /tokenize`` with a chat."""

    model: Text | None = Field(None, description="a name of /v1/models")
    add_special_tokens: Literal[False] | None = Field(
        None, description="not used: the chat template writes them"
    )
    return_token_strs: bool | None = Field(None, description="the tokens' texts too")


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    model: Text | None = Field(None, description="a name of /v1/models")
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=1 << 20)]


def _form(body: Any) -> str:
    return "TokenizeChat" if isinstance(body, dict) and "messages" in body else "TokenizeText"


TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag("TokenizeText")] | Annotated[TokenizeChat, Tag("TokenizeChat")],
    Discriminator(_form),
]
"""``POST /tokenize``: a text, or a chat where there are messages."""
