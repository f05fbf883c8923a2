"""What a request may hold, field by field. Unknown fields and wrong types are refused."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from mor.engine.params import MAX_LOGPROBS

MAX_N = 128
MAX_PROMPTS = 1024
MAX_BIAS = 1024
LARGE = 2**31 - 1


def _characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not hold half of a surrogate pair") from None
    return text


def _few(entries: Any) -> Any:
    """Count before each is looked at."""
    if isinstance(entries, dict) and len(entries) > MAX_BIAS:
        raise ValueError(f"should have at most {MAX_BIAS} entries, not {len(entries)}")
    return entries


Text = Annotated[str, AfterValidator(_characters)]
TokenId = Annotated[int, Field(ge=0, le=LARGE)]
# `fail_fast`: of a million wrong entries the first one is told, and the others are not looked at.
Ids = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_characters)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class Strict(BaseModel):
    """No unknown field, no text for a number, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, fields: Any) -> Any:
        """Of many unknown fields the first is told."""
        if not isinstance(fields, dict) or len(fields) <= len(cls.model_fields):
            return fields
        known = {name: fields[name] for name in cls.model_fields if name in fields}
        unknown = (name for name in fields if name not in cls.model_fields)
        return known | {name: fields[name] for name in islice(unknown, 1)}


class StreamOptions(Strict):
    """Settings of an answer that is sent token by token."""

    include_usage: bool | None = Field(None, description="end with a chunk that holds `usage`")


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
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=16)] | None = Field(
        None, description="texts that end a completion; they are not part of it"
    )
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
    # Ours.
    depth_cap: int | None = Field(None, ge=1, le=LARGE, description="most recursions per token")
    capacity: float | None = Field(
        None, gt=0, le=100, description="factor on the trained capacities; needs calibrated levels"
    )

    @model_validator(mode="after")
    def _streams(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
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
    suffix: None = Field(None, description="not supported")

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported")
        return self

    @property
    def reads_only(self) -> bool:
        """Whether an answer makes sense without a new token."""
        return bool(self.echo) or super().reads_only


class TextPart(Strict):
    """Part of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]
    name: Text | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ResponseFormat(Strict):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=LARGE, description="most new tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = Field(None, description="default true")

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self
