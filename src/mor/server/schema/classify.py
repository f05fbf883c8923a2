"""``POST /v1/classify``: what it takes and gives. Beside vLLM's ``/classify``, with depth."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from mor.server.schema.basics import LARGE, MISSING, Refusal, Strict, Text

MAX_INPUTS = 64
Number = Annotated[float, Field(ge=-1e6, le=1e6)]


class Item(Strict):
    """An image, a sound, or the frames of one."""

    type: Literal["image_url", "input_audio", "input_features"]
    image_url: Any = Field(None, description="{'url': 'data:image/png;base64,...'}")
    input_audio: Any = Field(None, description="{'data': base64, 'format': 'wav'}")
    input_features: Annotated[list[list[Number]], Field(max_length=20_000)] | None = Field(
        None, description="frames of coefficients, for models whose processor takes these"
    )

    @model_validator(mode="after")
    def _filled(self) -> Item:
        if getattr(self, self.type) is None:
            raise Refusal(MISSING, self.type, "a part has it")
        return self


class ClassifyRequest(Strict):
    """``POST /v1/classify``."""

    model: Text = Field(description="a name of /v1/models")
    input: (
        Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)] | Item
    ) = Field(description="an image or a sound, or a list of them")
    depth_cap: int | None = Field(None, ge=1, le=LARGE, description="most recursions per token")
    user: Text | None = Field(None, description="not used")


class ClassUsage(BaseModel):
    """Tokens that were read: patches, or places that the convolution made of frames."""

    prompt_tokens: int
    total_tokens: int


class Classification(BaseModel):
    """Of one input. ``depths`` and ``grid`` are ours."""

    index: int
    label: str = Field(description="the likeliest class")
    probs: list[float] = Field(description="one per class, in the order of `labels`")
    num_classes: int
    depths: list[int] = Field(
        description="recursions of each token: patches row by row, or frames in order"
    )
    grid: list[int] | None = Field(description="rows and columns of patches; null for sounds")


class ClassifyResponse(BaseModel):
    """The answer of ``POST /v1/classify``."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str] = Field(description="names of the classes")
    num_recursions: int
    data: list[Classification]
    usage: ClassUsage


class ClassifierModel(BaseModel):
    """A model of ``/v1/models``; all after ``owned_by`` is ours."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: Literal["classify"]
    takes: Literal["image_url", "input_audio", "input_features"]
    labels: list[str]
    num_recursions: int
    router: str


class ClassifierList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"]
    data: list[ClassifierModel]
