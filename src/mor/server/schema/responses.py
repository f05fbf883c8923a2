"""What answers look like: the schema that ``/openapi.json`` shows and the tests hold."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    """Tokens of the prompt that were computed for an earlier request and not again."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Log-probabilities (nats) of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first of a prompt")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """A token that is, or might have been, in a prompt, as in vLLM."""

    logprob: float
    rank: int = Field(description="1: the likeliest")
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By token id, one entry per token of the prompt; null for the first."""


class Choice(BaseModel):
    """What choices of all kinds have. ``depths`` is ours: recursions that each token cost."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: int | str | None = Field(description="the stop id or stop text, as in vLLM")
    depths: list[int] = Field(
        description="one per new token: recursions at the position it was sampled from"
    )
    token_ids: list[int] | None = None


class CompletionChoice(Choice):
    """One completion."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(BaseModel):
    """``POST /v1/completions``; the chunks of a stream look the same."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopLogprob(BaseModel):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was sampled."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities (nats) of an answer's tokens."""

    content: list[TokenLogprob]


class CalledFunction(BaseModel):
    """A function that the model calls; ``arguments`` is JSON as text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model wrote."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The message that the model wrote; ``content`` is null where there are only calls."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ImageDepths(BaseModel):
    """How deep the patches of an image in the prompt went; ours."""

    grid: list[int] = Field(description="rows and columns of patches")
    depths: list[int] = Field(description="recursions of each patch, row by row")


class ChatChoice(Choice):
    """One answer."""

    message: AnswerMessage
    image_depths: list[ImageDepths] | None = Field(
        None, description="of the images in the prompt, in order; in a stream with the first token"
    )
    logprobs: ChatLogprobs | None


class ChatResponse(BaseModel):
    """``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class Capacities(BaseModel):
    """What ``capacity`` may be: factors on the trained capacities."""

    lowest: float
    highest: float


class Model(BaseModel):
    """A model of ``/v1/models``; the last six fields are ours."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    num_recursions: int
    router: str
    chat: bool
    capacity: Capacities | None
    modalities: list[str] = Field(description="what prompts may hold: text, image")


class ModelList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """``GET /health`` and ``GET /ready``."""

    status: str


class Version(BaseModel):
    """``GET /version``."""

    version: str


class TokenizeResponse(BaseModel):
    """``POST /tokenize``, as in vLLM."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    """``POST /detokenize``."""

    prompt: str
