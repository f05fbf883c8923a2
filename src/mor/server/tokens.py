"""From texts and chats to token ids, and how single tokens are shown."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from mor.config import MoRConfig
from mor.data import prompt_tokens
from mor.engine.intake import prompt_ids
from mor.engine.text import GrowingText
from mor.errors import MorError
from mor.server.errors import ApiError
from mor.server.structure.forms import find_form


class Tokens:
    """A tokenizer of the server's own: the engine's belongs to the engine's thread.

    Texts are encoded in one thread beside asyncio's, since a long one takes a while.

    Args:
        tokenizer: of the model.
        config: of the model.
        chat_template: in place of the tokenizer's.
    """

    def __init__(self, tokenizer: Any, config: MoRConfig, chat_template: str | None = None) -> None:
        self.tokenizer, self.config = copy.deepcopy(tokenizer), config
        self.template, self.tool_template = _templates(tokenizer, chat_template)
        self.form = find_form(self.tool_template or "")
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self.special_ids = {str(text): int(token) for text, token in special}
        self._thread = ThreadPoolExecutor(1, "mor-tokens")
        backend = getattr(tokenizer, "backend_tokenizer", None)  # only fast ones have it
        rules = "" if backend is None else str(backend.to_str())
        self._byte_of = _byte_alphabet() if '"ByteLevel"' in rules else None
        self._added = {str(t) for t in tokenizer.get_added_vocab()}
        self.piece = lru_cache(1 << 16)(self._piece)

    def close(self) -> None:
        """End the thread that makes tokens."""
        self._thread.shutdown(wait=False)

    async def encode(self, prompts: Sequence[str | Sequence[int]]) -> list[tuple[int, ...]]:
        """Token ids of prompts.

        Raises:
            MorError: a prompt without tokens, or ids that the model does not have.
        """

        def work() -> list[tuple[int, ...]]:
            return [prompt_ids(prompt, self.tokenizer, self.config) for prompt in prompts]

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def encode_words(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of words as they stand within a text: at its beginning, and after a blank."""

        def work() -> list[tuple[int, ...]]:
            forms = [form for word in words for form in (word, " " + word.lstrip())]
            ids = [tuple(self.tokenizer(f, add_special_tokens=False).input_ids) for f in forms]
            return [one for one in dict.fromkeys(ids) if one]

        if not words:
            return []
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def encode_plain(self, text: str) -> tuple[int, ...]:
        """Token ids of a text alone, without any special tokens around it."""

        def work() -> tuple[int, ...]:
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        *,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a chat by the chat template, which sets the special tokens itself.

        A BOS with which the model's texts begin is there once, whether the template writes it or
        not.

        Args:
            messages: as templates know them.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: end within the last message, which the answer goes on with.
            tools: functions that the model may call.
            variables: further ones of the template.

        Raises:
            ApiError: there is no template, or it refuses these messages, or a variable is one that
                the server sets.
        """
        if self.template is None:
            raise ApiError(
                400,
                "The model has no chat template; use /v1/completions, or start the server with "
                "--chat-template FILE",
                code="no_chat_template",
            )

        ours = sorted(_RESERVED & set(variables or ()))
        if ours:
            raise ApiError(
                400,
                f"chat_template_kwargs.{ours[0]} is set by the server; leave it out",
                param="chat_template_kwargs",
                code="invalid_value",
            )

        def work() -> tuple[int, ...]:
            try:
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools or None,
                    chat_template=self.tool_template if tools else self.template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **(variables or {}),
                )
                text.encode()
            except Exception as error:  # a template raises whatever it likes
                why = " ".join(str(error).split())[:200]
                raise ApiError(
                    400, f"The chat template refuses the messages: {why}", param="messages"
                ) from None
            ids = prompt_tokens(text, self.tokenizer, self.config) if text else []
            return prompt_ids(ids, self.tokenizer, self.config)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except MorError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    async def show(self, ids: Sequence[int]) -> str:
        """Text with special tokens, made in the thread."""

        def work() -> str:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def begin_text(self) -> GrowingText:
        """A text that grows token by token, as the engine makes it."""
        return GrowingText(self.tokenizer, ())

    def _piece(self, token: int) -> tuple[str, tuple[int, ...]]:
        """A token's name and bytes; part of a character is called ``bytes:\\xe2``, as by OpenAI."""
        raw = self._bytes(token)
        try:
            return raw.decode("utf-8"), tuple(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), tuple(raw)

    def _bytes(self, token: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(token) if token < len(self.tokenizer) else None
        if piece is None:
            return f"<{token}>".encode()  # an embedding of the model's without a token
        if piece in self._added:
            return str(piece).encode()
        if self._byte_of is not None:
            if all(letter in self._byte_of for letter in piece):
                return bytes(self._byte_of[letter] for letter in piece)
        elif len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()


# What the server says to the template itself; the rest are arguments of `apply_chat_template`.
_RESERVED = frozenset(
    ["add_generation_prompt", "chat_template", "continue_final_message", "conversation",
     "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
     "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"]
)  # fmt: skip


def _templates(tokenizer: Any, given: str | None) -> tuple[str | None, str | None]:
    """The template of chats, and that of chats with functions; some tokenizers have two."""
    found = given or getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        plain = found.get("default") or next(iter(found.values()), None)
        return plain, found.get("tool_use") or plain
    return found, found


def _byte_alphabet() -> dict[str, int]:
    """The letter that stands for each byte in byte-level BPE (GPT-2), the other way round."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    rest = [byte for byte in range(256) if byte not in plain]
    return letters | {chr(256 + place): byte for place, byte in enumerate(rest)}
