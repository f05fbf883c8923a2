"""What every section of a recipe is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mor.errors import MorError, nearest
from mor.train.recipe.fields import lists_of_one


def suggest(word: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` or the list of what there is."""
    close = nearest(word, known)
    return f"; did you mean {close!r}?" if close else f"; known: {', '.join(sorted(known))}"


class RecipeError(MorError, ValueError):
    """A recipe cannot be run; the message names the field and says what would be right."""


class Section(BaseModel):
    """Base of all sections: unknown fields and lax types are refused.

    A list of one may be written without its brackets: ``report_to: wandb``.
    """

    # Strict: `batch_size: true` is a slip, not 1. Numbers are read by `mor.train.recipe.file`.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, raw: Any) -> Any:
        return lists_of_one(cls, raw)


Folder = Annotated[Path, Field(strict=False)]
