"""Functions that a model may call, and forms that an answer must have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from mor.server.schema.basics import (
    MISSING,
    UNSUPPORTED,
    WRONG,
    FunctionsOnly,
    Refusal,
    Strict,
    Text,
    check_characters,
    neutral_only,
)

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class Function(Strict):
    """What a model must know of a function."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema; none: no arguments")
    strict: bool | None = Field(None, description="not used: a call that is forced is always so")


class Tool(FunctionsOnly):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function
    cache_control: dict[str, Any] | None = Field(None, description="not used")

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        return self.model_dump(exclude={"cache_control"}, exclude_none=True)


class ChosenFunction(Strict):
    """The name of a function."""

    name: FunctionName


class ToolChoice(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: ChosenFunction

    @model_validator(mode="before")
    @classmethod
    def _functions_only(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in ("custom", "allowed_tools"):
            kind = value["type"]
            raise Refusal(UNSUPPORTED, None, f"type {kind!r} is not supported; use 'function'")
        return value


class JsonSchema(Strict):
    """A JSON schema with a name."""

    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="none: any object")
    strict: bool | None = Field(None, description="not used: an answer always keeps to the schema")


class ResponseFormat(Strict):
    """Text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        wanted, given = self.type == "json_schema", self.json_schema is not None
        if wanted and not given:
            raise Refusal(MISSING, "json_schema", "type 'json_schema' needs it")
        if given and not wanted:
            raise Refusal(WRONG, "json_schema", f"type {self.type!r} has none; leave it out")
        return self


_Choice = Annotated[str, Field(min_length=1), AfterValidator(check_characters)]
Choices = Annotated[list[_Choice], Field(min_length=1, max_length=1024)]


class StructuredOutputs(Strict):
    """As in vLLM: one of these."""

    json_: dict[str, Any] | Text | None = Field(None, alias="json", description="JSON schema")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = Field(None, description="GBNF or Lark")
    structural_tag: neutral_only("use tools") = None  # type: ignore[valid-type]
