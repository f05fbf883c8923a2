"""What a request says about the form of its answers: grammars, words, ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mor.engine import SamplingParams
from mor.errors import MorError
from mor.server.errors import ApiError, explain_refusal
from mor.server.images import check_media
from mor.server.schema.chats import Turns
from mor.server.schema.requests import ChatRequest, CompletionRequest, Sampling
from mor.server.schema.tools import ToolChoice
from mor.server.state import State
from mor.server.structure.forms import Form, calls_source
from mor.server.structure.reader import CallReader
from mor.server.structure.sources import (
    ANY_OBJECT,
    Source,
    from_choice,
    from_grammar,
    from_regex,
    from_schema,
)


async def shape_params(
    params: SamplingParams, body: CompletionRequest | ChatRequest, state: State
) -> SamplingParams:
    """``params`` with what ``body`` says about the form of its answers.

    Raises:
        ApiError: a wrong grammar or schema, two of them, words that are none.
    """
    source = _wanted_form(body)
    special = state.tokens.special_ids
    skip = body.skip_special_tokens is not False
    if isinstance(body, ChatRequest) and body.usable_tools:
        form = find_tool_form(state)
        if body.tool_choice not in (None, "auto"):
            source = _calls(body, form, special)
        elif source is not None:
            source = _either(source, _calls(body, form, special))
        # A mark that is a special token must be seen.
        skip = skip and form.begin not in special
    grammar = None if source is None else await state.grammars.compile(source)
    try:
        return replace(
            params,
            min_tokens=body.min_tokens or 0,
            bad_words=await state.tokens.encode_words(body.bad_words or ()),
            skip_special_tokens=skip,
            include_stop=bool(body.include_stop_str_in_output),
            grammar=grammar,
        )
    except MorError as error:
        raise explain_refusal(error) from None


async def encode_turns(body: Turns, state: State, most: int) -> Sequence[int]:
    """Token ids of a chat by the chat template, images at their places; ``most`` of them fit.

    Raises:
        ApiError: see :meth:`mor.server.tokens.Tokens.encode_chat`; or it knows no functions; or
            images or sounds that the model does not take.
    """
    if body.usable_tools:
        find_tool_form(state)
    check_media(body, state.images)
    begin = body.add_generation_prompt
    if begin is None:
        begin = not body.continue_final_message
    image = "" if state.images is None else state.images.token
    ids = await state.tokens.encode_chat(
        [message.plain(image) for message in body.messages],
        begin,
        most,
        continue_final_message=bool(body.continue_final_message),
        tools=[tool.plain() for tool in body.usable_tools],
        variables=body.chat_template_kwargs,
    )
    return ids if state.images is None else await state.images.prompt(ids, body, most)


def find_tool_form(state: State) -> Form:
    """How calls are written by the model's chat template.

    Raises:
        ApiError: it does not know functions.
    """
    form = state.tokens.form
    if form is None:
        raise ApiError(
            400,
            "tools: the model's chat template does not know functions (or writes their calls in "
            "no form known here); leave tools out, or start the server with --chat-template FILE",
            param="tools",
            code="unsupported_parameter",
        )
    return form


def make_reader(body: CompletionRequest | ChatRequest, state: State) -> CallReader | None:
    """What tells calls from content in one answer; None where nothing can be called."""
    if not isinstance(body, ChatRequest) or not body.usable_tools:
        return None
    names = {tool.function.name for tool in body.usable_tools}
    return CallReader(find_tool_form(state), names, body.parallel_tool_calls is not False)


def _calls(body: ChatRequest, form: Form, special: Mapping[str, int]) -> Source:
    choice, several = body.tool_choice, body.parallel_tool_calls is not False
    wanted = choice.function.name if isinstance(choice, ToolChoice) else None
    functions = [
        (f"tools[{place}].function.parameters", tool.function.name, tool.function.parameters)
        for place, tool in enumerate(body.usable_tools)
        if wanted in (None, tool.function.name)
    ]
    return calls_source(form, functions, several and wanted is None, special)


def _either(content: Source, calls: Source) -> Source:
    """An answer of the form that was asked for, or calls.

    Raises:
        ApiError: the form is no JSON.
    """
    if content.kind != "lark":
        raise ApiError(
            400,
            f"{content.name} cannot be used together with tools; leave one of them out",
            param=content.name,
            code="unsupported_parameter",
        )
    rules = dict(calls.rules) | {"content": content.start, "calls": calls.start}
    parts = dict(content.parts) | dict(calls.parts)
    return Source(content.name, "content | calls", rules, parts=parts)


def _wanted_form(body: Sampling) -> Source | None:
    """The grammar that a request's fields ask for.

    Raises:
        ApiError: more than one does.
    """
    found = list(_guided(body))
    if len(found) > 1:
        raise ApiError(
            400,
            f"{found[1].name} together with {found[0].name}: an answer has one form; leave one out",
            param=found[1].name,
            code="invalid_value",
        )
    return found[0] if found else None


def _guided(body: Sampling) -> list[Source]:
    found: list[Source] = []
    asked = body.response_format
    if asked is not None and asked.type != "text":
        schema: Any = ANY_OBJECT
        name = "response_format"
        if asked.json_schema is not None and asked.json_schema.schema_ is not None:
            name, schema = f"{name}.json_schema.schema", asked.json_schema.schema_
        found.append(from_schema(name, schema))
    outer = body.structured_outputs
    values: list[tuple[str, Any, Any]] = [
        ("guided_json", body.guided_json, _from_json),
        ("guided_regex", body.guided_regex, from_regex),
        ("guided_choice", body.guided_choice, from_choice),
        ("guided_grammar", body.guided_grammar, from_grammar),
    ]
    if outer is not None:
        values += [
            ("structured_outputs.json", outer.json_, _from_json),
            ("structured_outputs.regex", outer.regex, from_regex),
            ("structured_outputs.choice", outer.choice, from_choice),
            ("structured_outputs.grammar", outer.grammar, from_grammar),
        ]
        if outer.json_object:
            found.append(from_schema("structured_outputs.json_object", ANY_OBJECT))
    return found + [make(name, value) for name, value, make in values if value is not None]


def _from_json(name: str, schema: Any) -> Source:
    """A schema, which vLLM's clients may also send as text.

    Raises:
        ApiError: the text is no JSON.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise ApiError(
                400, f"{name} must be a JSON schema", param=name, code="invalid_value"
            ) from None
    return from_schema(name, schema)
