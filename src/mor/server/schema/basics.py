"""What the fields of all requests are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

LARGE = 2**31 - 1
UNSUPPORTED, MISSING, WRONG = "mor_unsupported", "mor_missing", "mor_wrong"


def refuse(kind: str, field: str | None, message: str) -> PydanticCustomError:
    """The error that a validator raises.

    Args:
        kind: ``UNSUPPORTED``, ``MISSING`` or ``WRONG``.
        field: which field of the object that is checked; None where the validator is the field's.
        message: what is wrong and what would be right.
    """
    return PydanticCustomError(kind, "{message}", {"message": message, "field": field})


def check_characters(text: str) -> str:
    """Refuse what cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not hold half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(check_characters)]
TokenId = Annotated[int, Field(ge=0, le=LARGE)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class Strict(BaseModel):
    """No unknown field, no text for a number, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def neutral_only(hint: str, *neutral: Any) -> Any:
    """The type of a field that is known and not supported.

    Null, empty values and those of ``neutral`` ask for nothing and are accepted.

    Args:
        hint: what to do instead, for the error.
        neutral: further values that ask for nothing.
    """

    def check(value: Any) -> Any:
        if value is None or value in ("", [], {}) or value in neutral:
            return value
        raise refuse(UNSUPPORTED, None, f"is not supported by this server; {hint}")

    return Annotated[Any, AfterValidator(check)]
