"""What a request may hold, field by field. Unknown fields and wrong types are refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from mor.engine.params import MAX_LOGPROBS
from mor.server.schema.basics import (
    LARGE,
    UNSUPPORTED,
    EmptyIsNull,
    Ids,
    Refusal,
    Strict,
    Text,
    TokenId,
    check_characters,
    neutral_only,
)
from mor.server.schema.chats import Turns
from mor.server.schema.tools import Choices, ResponseFormat, StructuredOutputs

MAX_N = 128
MAX_PROMPTS = 1024
MAX_BIAS = 1024
MAX_STOPS = 16


def _few(entries: Any) -> Any:
    """Count before each is looked at."""
    if isinstance(entries, dict) and len(entries) > MAX_BIAS:
        raise ValueError(f"should have at most {MAX_BIAS} entries, not {len(entries)}")
    return entries


def _no_stop(stop: Any) -> Any:
    """An empty text ends nothing."""
    return [text for text in stop if text] if isinstance(stop, list) else stop or None


Stop = Annotated[str, Field(max_length=1000), AfterValidator(check_characters)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
BadWord = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(check_characters)]
UNUSED = "not used"


class StreamOptions(Strict):
    """Settings of an answer that is sent token by token."""

    include_usage: bool | None = Field(None, description="end with a chunk that holds `usage`")
    continuous_usage_stats: bool | None = Field(
        None, description="with include_usage: every chunk tells the usage so far, as in vLLM"
    )
    include_obfuscation: bool | None = Field(None, description="not used: nothing is added")

    @property
    def asks(self) -> bool:
        """Whether any of them is for something."""
        return bool(self.include_usage or self.continuous_usage_stats or self.include_obfuscation)


class Sampling(Strict):
    """What completions and chats have in common. ``null`` stands for the default everywhere."""

    model: Text = Field(description="a name of /v1/models")
    max_tokens: int | None = Field(
        None, ge=0, le=LARGE, description="most new tokens; 0 needs echo or prompt_logprobs"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="default 1; 0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1, description="0: the likeliest token alone")
    n: int | None = Field(None, ge=1, le=MAX_N, description="completions of each prompt")
    stream: bool | None = Field(None, description="server-sent events, one per token")
    stream_options: StreamOptions | None = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | None,
        AfterValidator(_no_stop),
    ] = Field(None, description="texts that end a completion; they are not part of it")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="-1: drawn, as null")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[TokenName, Bias], Field(max_length=MAX_BIAS), BeforeValidator(_few)] | None
    ) = Field(None, description="token id, as text, to what is added to its logit")
    user: Text | None = Field(None, description="not used")
    # As in vLLM.
    top_k: int | None = Field(None, ge=-1, le=LARGE, description="0 or -1: all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=1024)] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="so many likeliest tokens at each prompt token"
    )
    return_token_ids: bool | None = Field(None, description="add `token_ids` to each choice")
    min_tokens: int | None = Field(None, ge=0, le=LARGE, description="no end before so many")
    bad_words: Annotated[list[BadWord], Field(max_length=128)] | None = Field(
        None, description="texts that are not written"
    )
    skip_special_tokens: bool | None = Field(None, description="default true")
    include_stop_str_in_output: bool | None = Field(None, description="default false")
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = Field(None, description="JSON schema")
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = Field(None, description="GBNF or Lark")
    response_format: Annotated[ResponseFormat | None, EmptyIsNull()] = None
    # Ours.
    depth_cap: int | None = Field(None, ge=1, le=LARGE, description="most recursions per token")
    capacity: float | None = Field(
        None, gt=0, le=100, description="factor on the trained capacities; needs calibrated levels"
    )

    @model_validator(mode="after")
    def _streams(self) -> Sampling:
        options = self.stream_options
        if options is not None and options.asks and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs are not sent with stream=true")
        if self.max_tokens == 0 and not self.reads_only:
            raise ValueError(
                "max_tokens must be greater than or equal to 1; 0 goes with echo or prompt_logprobs"
            )
        return self

    @property
    def reads_only(self) -> bool:
        """Whether an answer makes sense without a new token."""
        return self.prompt_logprobs is not None


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="a text, token ids, or a list of these")
    echo: bool | None = Field(
        None, description="begin the text with the prompt, and `logprobs` with those of its tokens"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="so many likeliest tokens beside each token"
    )
    best_of: int | None = Field(None, ge=1, le=MAX_N, description="only equal to n")
    suffix: neutral_only("leave it out") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Refusal(UNSUPPORTED, "best_of", "another one than n is not supported")
        return self

    @property
    def reads_only(self) -> bool:
        """Whether an answer makes sense without a new token."""
        return bool(self.echo) or super().reads_only


_TEXTS: dict[str, Any] = {"type": "array", "items": {"const": "text"}}


def _text_only(modalities: list[str]) -> list[str]:
    if set(modalities) - {"text"}:
        raise Refusal(UNSUPPORTED, None, "only 'text' is supported by this server")
    return modalities


class AskedOfOpenAI(Strict):
    """Fields of OpenAI's that change nothing here, and those that must ask for nothing."""

    metadata: dict[str, Any] | None = Field(None, description=UNUSED)
    modalities: Annotated[list[Text], AfterValidator(_text_only), WithJsonSchema(_TEXTS)] | None = (
        None
    )
    prompt_cache_key: Text | None = Field(None, description=UNUSED)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=UNUSED)
    prompt_cache_retention: Text | None = Field(None, description=UNUSED)
    reasoning_effort: Text | None = Field(None, description=UNUSED)
    safety_identifier: Text | None = Field(None, description=UNUSED)
    service_tier: Text | None = Field(None, description=UNUSED)
    store: bool | None = Field(None, description="not used: nothing is stored")
    verbosity: Text | None = Field(None, description=UNUSED)
    audio: neutral_only("only text is") = None  # type: ignore[valid-type]
    function_call: neutral_only("use tool_choice", "none", "auto") = None  # type: ignore[valid-type]
    functions: neutral_only("use tools") = None  # type: ignore[valid-type]
    moderation: neutral_only("leave it out") = None  # type: ignore[valid-type]
    prediction: neutral_only("leave it out") = None  # type: ignore[valid-type]
    web_search_options: neutral_only("leave it out") = None  # type: ignore[valid-type]


class ChatRequest(Turns, AskedOfOpenAI, Sampling):
    """``POST /v1/chat/completions``."""

    max_completion_tokens: int | None = Field(None, ge=1, le=LARGE, description="most new tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self
