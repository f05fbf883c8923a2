"""From texts and chats to token ids, and how single tokens are shown."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from mor.config import MoRConfig
from mor.engine.fitting import is_too_long
from mor.engine.intake import TooLong, prompt_ids
from mor.engine.text import Decoder
from mor.errors import MorError
from mor.server.errors import ApiError, explain_refusal
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

    async def encode(
        self, prompts: Sequence[str | Sequence[int]], most: int | None = None
    ) -> list[tuple[int, ...]]:
        """Token ids of prompts.

        Texts go through the thread one by one, so that the prompts of others come in between;
        token ids do not wait for any of them.

        Args:
            prompts: texts or ids.
            most: tokens that fit; a longer prompt is refused without making all its tokens.

        Raises:
            TooLong: a prompt does not fit.
            MorError: a prompt without tokens, or ids that the model does not have.
        """
        return [
            await self._encode_text(prompt, most)
            if isinstance(prompt, str)
            else prompt_ids(prompt, self.tokenizer, self.config, most)
            for prompt in prompts
        ]

    async def _encode_text(self, text: str, most: int | None) -> tuple[int, ...]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._thread, prompt_ids, text, self.tokenizer, self.config, most
        )

    async def encode_words(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of words as they stand within a text: at its beginning, and after a blank."""

        def work() -> list[tuple[int, ...]]:
            forms = [form for word in words for form in (word, " " + word.lstrip())]
            ids = [tuple(self.tokenizer(f, add_special_tokens=False).input_ids) for f in forms]
            return [one for one in dict.fromkeys(ids) if one]

        if not words:
            return []
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def encode_plain(self, text: str, most: int) -> tuple[int, ...]:
        """Token ids of a text alone, without any special tokens around it.

        Raises:
            TooLong: it has more than ``most`` tokens by far.
        """

        def work() -> tuple[int, ...]:
            if is_too_long(text, self.tokenizer, most):
                raise TooLong(f"prompt of {len(text)} characters has more than {most} tokens")
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        most: int | None = None,
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
            most: tokens that fit.
            continue_final_message: end within the last message, which the answer goes on with.
            tools: functions that the model may call.
            variables: further ones of the template.

        Raises:
            ApiError: there is no template, it refuses these messages, a variable is one that the
                server sets, or the tokens are more than ``most`` by far.
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
                    400,
                    f"The chat template refuses the messages: {why}",
                    param="messages",
                    code="invalid_value",
                ) from None
            return prompt_ids(text or [], self.tokenizer, self.config, most)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except MorError as error:
            problem = explain_refusal(error)
            problem.param = "messages"
            raise problem from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a prompt, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    async def show(self, ids: Sequence[int]) -> str:
        """The same for many tokens, made in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.decode, ids)

    def begin_text(self, skip_special_tokens: bool = True) -> Decoder:
        """A text that grows token by token, as the engine makes it."""
        return Decoder(self.tokenizer, skip_special_tokens)

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
     "return_tensors", "self", "tokenize", "tokenizer_kwargs", "tools", "truncation"]
)  # fmt: skip


def _templates(tokenizer: Any, given: str | None) -> tuple[str | None, str | None]:
    """The template of chats, and that of chats with functions; some tokenizers have two."""
    own = getattr(tokenizer, "chat_template", None)
    if not isinstance(own, dict):
        return given or own, given or own
    plain = given or own.get("default") or next(iter(own.values()), None)
    return plain, own.get("tool_use", plain) if plain in own.values() else plain


def _byte_alphabet() -> dict[str, int]:
    """The letter that stands for each byte in byte-level BPE (GPT-2), the other way round."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    rest = [byte for byte in range(256) if byte not in plain]
    return letters | {chr(256 + place): byte for place, byte in enumerate(rest)}
