"""The turns of a chat, as clients write them and as chat templates know them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from mor.server.schema.basics import (
    MISSING,
    UNSUPPORTED,
    WRONG,
    FunctionsOnly,
    Refusal,
    Strict,
    Text,
    neutral_only,
)

_OTHER_PARTS = (
    "audio_url", "document", "file", "image", "input_image", "video", "video_url",
)  # fmt: skip
MEDIA_PARTS = ("image_url", "input_audio")
_ASSISTANT_ONLY = ("refusal", "annotations", "audio", "function_call", "tool_calls")


def _needing(schema: dict[str, Any], key: str, value: str, *names: str) -> dict[str, Any]:
    """A shape of ``schema``: where ``key`` is ``value``, these fields are there and not null."""
    fields = dict(schema["properties"]) | {key: {"const": value}}
    for name in names:
        forms = [form for form in fields[name]["anyOf"] if form != {"type": "null"}]
        fields[name] = fields[name] | {"anyOf": forms}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": fields,
        "required": [key, *names],
    }


def _show(schema: dict[str, Any], shapes: list[dict[str, Any]]) -> None:
    """Tell what the validators hold: in ``/openapi.json`` an object has one of some shapes."""
    kept: dict[str, Any] = {n: schema[n] for n in ("title", "description") if n in schema}
    schema.clear()
    schema.update(kept, anyOf=shapes)


def _show_part(schema: dict[str, Any]) -> None:
    shapes = [_needing(schema, "type", kind, kind) for kind in ("text", "refusal")]
    for shape in shapes:  # images and sounds are shown where a model takes them: `show_media`
        shape["properties"] |= {name: {"enum": [None]} for name in MEDIA_PARTS}
    _show(schema, shapes)


def show_media(part: dict[str, Any], kind: str) -> None:
    """Add images or sounds to the schema of a part.

    Args:
        part: as ``/openapi.json`` has it for models of text alone.
        kind: ``image_url`` or ``input_audio``.
    """
    url = {"type": "string", "pattern": "^data:", "description": "data:image/png;base64,..."}
    detail = {"enum": [None, "auto", "low", "high", "original"], "description": "not used"}
    data = {"type": "string", "description": "base64"}
    form = {"enum": [None, "wav", "mp3", "flac", "ogg"]}
    shapes: dict[str, tuple[str, dict[str, Any]]] = {
        "image_url": ("url", {"url": url, "detail": detail}),
        "input_audio": ("data", {"data": data, "format": form}),
    }
    needed, properties = shapes[kind]
    value = {"type": "object", "additionalProperties": False, "required": [needed],
             "properties": properties}  # fmt: skip
    fields = dict(part["anyOf"][0]["properties"])
    fields |= {"type": {"const": kind}, kind: value}
    part["anyOf"].append({
        "type": "object", "additionalProperties": False, "properties": fields,
        "required": ["type", kind],
    })  # fmt: skip


def _show_message(schema: dict[str, Any]) -> None:
    needs: dict[str, tuple[str, ...]] = {
        **dict.fromkeys(("system", "developer", "user"), ("content",)),
        "tool": ("content", "tool_call_id"),
        "function": ("name",),
    }
    shapes = [_needing(schema, "role", role, *names) for role, names in needs.items()]
    for shape in shapes:
        shape["properties"] |= {
            "refusal": {"enum": [None, ""]},
            "annotations": {"enum": [None, []]},
            "tool_calls": {"enum": [None, []]},
            "function_call": {"enum": [None]},
        }
    _show(schema, [*shapes, _needing(schema, "role", "assistant")])


class Part(Strict):
    """A piece of a message's content."""

    model_config = ConfigDict(json_schema_extra=_show_part)

    type: Literal["text", "refusal", "image_url", "input_audio"]
    text: Text | None = None
    refusal: Text | None = None
    # Looked at where it is known whether the model takes any: `mor.server.images`.
    image_url: Any = Field(None, description="an image, for models that read them: a data URL")
    input_audio: Any = Field(None, description="a sound, for models that hear them: base64")
    cache_control: dict[str, Any] | None = Field(None, description="not used")
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description="not used")

    @model_validator(mode="before")
    @classmethod
    def _words_only(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in _OTHER_PARTS:
            kind = value["type"]
            raise Refusal(UNSUPPORTED, None, f"parts of type {kind!r} are not supported; only text")
        return value

    @model_validator(mode="after")
    def _filled(self) -> Part:
        if self.type not in MEDIA_PARTS and self.words is None:
            raise Refusal(MISSING, self.type, "a part has it")
        for name in MEDIA_PARTS:
            if self.type != name and getattr(self, name) is not None:
                raise Refusal(WRONG, name, f"a part of type {self.type!r} has none")
        return self

    @property
    def words(self) -> str | None:
        """What it says."""
        return {"text": self.text, "refusal": self.refusal}.get(self.type)


class CalledFunction(Strict):
    """Which function an assistant called, and with what."""

    name: Text
    arguments: Text = Field(description="JSON, as text")
    parsed_arguments: Any = Field(None, description="not used; the client's parse() adds it")

    def plain(self) -> dict[str, Any]:
        """As chat templates know it: arguments that are a JSON object are one."""
        arguments: Any = self.arguments
        try:
            found = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            arguments = found
        return {"name": self.name, "arguments": arguments}


class CallInHistory(FunctionsOnly):
    """A call that an assistant made earlier."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="not used; chunks of a stream have it")

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        call = {"type": "function", "function": self.function.plain()}
        return call if self.id is None else {"id": self.id} | call


class Message(Strict):
    """One turn of a chat; an answer may be sent back as ``message.model_dump()`` gives it."""

    model_config = ConfigDict(json_schema_extra=_show_message)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: Annotated[list[CallInHistory], Field(fail_fast=True, max_length=1024)] | None = None
    function_call: CalledFunction | None = Field(None, description="deprecated: tool_calls")
    refusal: Text | None = None
    annotations: list[dict[str, Any]] | None = Field(None, description="not used")
    audio: neutral_only("only text is") = None  # type: ignore[valid-type]
    reasoning: Text | None = Field(None, description="not used")
    reasoning_content: Text | None = Field(None, description="not used")
    parsed: Any = Field(None, description="not used; the client's parse() adds it")
    cache_control: dict[str, Any] | None = Field(None, description="not used")

    @model_validator(mode="after")
    def _fits_the_role(self) -> Message:
        role = self.role
        if role != "assistant":
            for field in _ASSISTANT_ONLY:
                if getattr(self, field):
                    raise Refusal(WRONG, field, f"role {role!r} has none; role 'assistant' has it")
            if self.content is None and role != "function":
                raise Refusal(MISSING, "content", f"role {role!r} needs it")
        if role == "tool" and self.tool_call_id is None:
            raise Refusal(MISSING, "tool_call_id", "role 'tool' needs it")
        if role == "function" and self.name is None:
            raise Refusal(MISSING, "name", "role 'function' needs it")
        return self

    def plain(self, media: str = "") -> dict[str, Any]:
        """As chat templates know it.

        Args:
            media: what stands for an image or a sound.
        """
        content = self.content
        if isinstance(content, list):
            content = "".join(
                media if part.type in MEDIA_PARTS else part.words or "" for part in content
            )
        names = {"developer": "system", "function": "tool"}
        plain: dict[str, Any] = {
            "role": names.get(self.role, self.role),
            "content": content or self.refusal or "",
        }
        if self.name:
            plain["name"] = self.name
        calls = [call.plain() for call in self.tool_calls or ()]
        if self.function_call is not None and not calls:
            calls = [{"type": "function", "function": self.function_call.plain()}]
        if calls:
            plain["tool_calls"] = calls
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        return plain
