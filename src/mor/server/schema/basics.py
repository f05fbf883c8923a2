"""What the fields of all requests are made of."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import core_schema

LARGE = 2**31 - 1
# Codes of answers that refuse a field.
UNSUPPORTED, MISSING, WRONG = "unsupported_parameter", "missing_field", "invalid_value"


class Refusal(ValueError):
    """What a validator raises.

    Args:
        code: ``UNSUPPORTED``, ``MISSING`` or ``WRONG``.
        field: which field of the object that is checked; None where the validator is the field's.
        message: what is wrong and what would be right.
    """

    def __init__(self, code: str, field: str | None, message: str) -> None:
        super().__init__(message)
        self.code, self.field, self.message = code, field, message


def check_characters(text: str) -> str:
    """Refuse what cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not hold half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(check_characters)]
TokenId = Annotated[int, Field(ge=0, le=LARGE)]
# `fail_fast`: of a million wrong entries the first one is named, and the others are not looked at.
Ids = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]


class Strict(BaseModel):
    """No unknown field, no text for a number, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, fields: Any) -> Any:
        """Of many unknown fields the first is named."""
        if not isinstance(fields, dict) or len(fields) <= len(cls.model_fields):
            return fields
        names = [field.alias or name for name, field in cls.model_fields.items()]
        known = {name: fields[name] for name in names if name in fields}
        unknown = (name for name in fields if name not in known)
        return known | {name: fields[name] for name in islice(unknown, 1)}


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
        raise Refusal(UNSUPPORTED, None, f"is not supported by this server; {hint}")

    shown = {"enum": [None, "", [], {}, *neutral]}
    return Annotated[Any, AfterValidator(check), WithJsonSchema(shown)]


class EmptyIsNull:
    """Marks a field where an empty text or object asks for nothing, like null."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def read(value: Any) -> Any:
            return None if value in ("", {}) else value

        return core_schema.no_info_before_validator_function(read, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"enum": ["", {}]}]}


class FunctionsOnly(Strict):
    """A tool, or a call of one: functions, and nothing else that OpenAI has."""

    @model_validator(mode="before")
    @classmethod
    def _functions_only(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "custom":
            raise Refusal(UNSUPPORTED, None, "custom tools are not supported; only functions")
        return value
