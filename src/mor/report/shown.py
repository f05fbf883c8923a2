"""Images and sounds that an evaluation kept to be looked at."""

from __future__ import annotations

import base64
import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Shown(BaseModel):
    """An image or a sound with the depth of each of its tokens (:mod:`mor.eval.shown`)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    truth: str
    answer: str
    nll: float | None
    mean_depth: float
    depths: list[list[Annotated[int, Field(ge=0)]]]
    frames_per_token: Annotated[int, Field(ge=1)] = 1
    shape: list[Annotated[int, Field(ge=1)]]
    values: Annotated[bytes, BeforeValidator(lambda text: base64.b64decode(text, validate=True))]

    @model_validator(mode="after")
    def _fits(self) -> Shown:
        if len(self.values) != math.prod(self.shape):
            raise ValueError(f"{len(self.values)} values for the shape {self.shape}")
        if not self.depths or len({len(row) for row in self.depths}) != 1 or not self.depths[0]:
            raise ValueError("depths has rows of unequal length, or none")
        return self
