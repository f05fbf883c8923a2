"""Answers of a given form: what comes is of it, whatever the model and whoever is in the batch."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from mor.server.structure import grammars
from tests.server.live import NAME, Live, tokenizer
from tests.server.test_errors import problem

pytest.importorskip("llguidance")

CHAT = "/v1/chat/completions"
TURNS: Any = [{"role": "user", "content": "who?"}]


class Rank(StrEnum):
    KING = "king"
    QUEEN = "queen"


class Person(BaseModel):
    rank: Rank
    heirs: list[Rank]


def short(schema: dict[str, Any]) -> dict[str, Any]:
    """A random model would never end a list."""
    schema["properties"]["heirs"]["maxItems"] = 2
    return schema


SCHEMA = short(Person.model_json_schema())


def as_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def chat(live: Live, **fields: Any) -> Any:
    start: dict[str, Any] = {"model": NAME, "messages": TURNS, "temperature": 0}
    extra = {key: fields.pop(key) for key in list(fields) if key.startswith(("guided", "struct"))}
    return live.openai().chat.completions.create(**start | fields, extra_body=extra).choices[0]


def test_json_by_a_schema(caller: Live) -> None:
    fields: dict[str, Any] = {"temperature": 1.5, "seed": 4}
    choice = chat(caller, response_format=as_format(SCHEMA), **fields)
    assert choice.finish_reason == "stop"
    assert len(Person.model_validate_json(choice.message.content).heirs) <= 2
    assert "\n" not in choice.message.content


def test_the_client_parses(caller: Live) -> None:
    class Small(BaseModel):
        rank: Rank
        crowned: bool

    answer = caller.openai().chat.completions.parse(
        model=NAME, messages=TURNS, response_format=Small, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Small)
    with caller.openai().chat.completions.stream(
        model=NAME, messages=TURNS, response_format=Small, temperature=0
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


def test_any_json_object(caller: Live) -> None:
    choice = chat(caller, response_format={"type": "json_object"}, max_tokens=5)
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith("{")
    brace = str(tokenizer().convert_tokens_to_ids("}"))
    choice = chat(caller, response_format={"type": "json_object"}, logit_bias={brace: 100})
    assert (choice.message.content, choice.finish_reason) == ("{}", "stop")


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"guided_choice": ["yes", "no é東", 'a "b"\n/\\']}, r'yes|no é東|a "b"\n/\\'),
    ({"guided_regex": r"[0-9]{3}-(a|b)"}, r"[0-9]{3}-(a|b)"),
    ({"guided_json": {"enum": [1, 22]}}, "1|22"),
    ({"guided_json": '{"type": "boolean"}'}, "true|false"),
    ({"guided_grammar": 'root ::= ("x" | "y") "z"'}, "[xy]z"),
    ({"guided_grammar": 'start: ("x" | "y") "z"'}, "[xy]z"),
    ({"structured_outputs": {"choice": ["oui"]}}, "oui"),
    ({"structured_outputs": {"regex": "a{4}"}}, "aaaa"),
    ({"structured_outputs": {"json": {"const": None}}}, "null"),
    ({"structured_outputs": {"grammar": 'root ::= "q"'}}, "q"),
]


@pytest.mark.parametrize(("fields", "pattern"), FORMS)
def test_forms_of_other_kinds(caller: Live, fields: dict[str, Any], pattern: str) -> None:
    choice = chat(caller, **fields)
    assert re.fullmatch(pattern, choice.message.content)
    assert (choice.finish_reason, choice.stop_reason) == ("stop", None)
    body = {"model": NAME, "prompt": "the", "temperature": 0, "max_tokens": 40} | fields
    with caller.http() as http:
        told = http.post("/v1/completions", json=body).json()["choices"][0]
    assert re.fullmatch(pattern, told["text"])
    assert told["finish_reason"] == "stop"


def test_batch_mates_change_nothing(caller: Live) -> None:
    """Neither those with a form of their own nor those without one."""
    asked: list[dict[str, Any]] = [
        *(fields for fields, _ in FORMS[:4]),
        {"max_tokens": 9},
        {"max_tokens": 9, "temperature": 1, "seed": 3},
        {"guided_json": {"enum": [*range(90)]}, "temperature": 2, "seed": 5, "n": 2},
        {"response_format": {"type": "json_object"}, "max_tokens": 9},
    ]

    def answers(fields: dict[str, Any]) -> Any:
        body = {"model": NAME, "messages": TURNS, "temperature": 0, "return_token_ids": True}
        with caller.http() as http:
            told = http.post(CHAT, json=body | fields).json()["choices"]
        return [(one["token_ids"], one["depths"], one["finish_reason"]) for one in told]

    alone = [answers(fields) for fields in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(answers, asked)) == alone
    assert alone[-2][0] != alone[-2][1]


def test_logprobs_are_the_models_own(caller: Live) -> None:
    """As documented: before a grammar, as before a temperature."""
    choice = chat(caller, guided_choice=["zz"], logprobs=True, top_logprobs=1)
    (first, *_) = choice.logprobs.content
    assert first.logprob < first.top_logprobs[0].logprob
    free = chat(caller, max_tokens=1, logprobs=True, top_logprobs=1)
    assert first.top_logprobs[0].logprob == pytest.approx(free.logprobs.content[0].logprob)


def test_min_tokens_and_bad_words_give_way(caller: Live) -> None:
    body = {"model": NAME, "prompt": "the", "guided_choice": ["yes"], "min_tokens": 9}
    with caller.http() as http:
        told = http.post("/v1/completions", json=body | {"bad_words": ["yes", "y"]}).json()
    assert told["choices"][0]["text"] == "yes"


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"response_format": as_format({"type": "objekt"})}, "response_format.json_schema.schema",
         "Invalid type: objekt"),
        ({"response_format": as_format({"type": "array", "uniqueItems": True})},
         "response_format.json_schema.schema", "uniqueItems"),
        ({"response_format": as_format({"$ref": "#/$defs/x"})},
         "response_format.json_schema.schema", "does not exist"),
        ({"response_format": as_format({"$ref": "http://a.example/x"})},
         "response_format.json_schema.schema", "not present"),
        ({"guided_json": "{"}, "guided_json", "JSON schema"),
        ({"guided_json": {"anyOf": []}}, "guided_json", "Unsatisfiable"),
        ({"guided_json": {"title": "x" * 300_000}}, "guided_json", "longer than"),
        ({"guided_json": {"type": "string", "pattern": "("}}, "guided_json", "unclosed group"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_grammar": "root := 5"}, "guided_grammar", ""),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": [""]}, "guided_choice[0]", "at least 1"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", "together"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs.choice",
         "together"),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml", "Unknown"),
    ],
)  # fmt: skip
def test_a_wrong_form_is_named(live: Live, fields: dict[str, Any], param: str, told: str) -> None:
    with live.http() as http:
        found = problem(http.post(CHAT, json={"model": NAME, "messages": TURNS} | fields), 400)
    assert found["param"] == param
    assert told in found["message"]
    assert "\n" not in found["message"]


def test_a_deep_schema_is_refused(live: Live) -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    with live.http() as http:
        body = {"model": NAME, "messages": TURNS, "guided_json": schema}
        assert http.post(CHAT, json=body).status_code == 400
        assert http.get("/ready").status_code == 200


def test_a_form_is_compiled_once(caller: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    plain = grammars.Grammars._compile
    monkeypatch.setattr(
        grammars.Grammars,
        "_compile",
        lambda self, source: made.append(source.text) or plain(self, source),
    )
    monkeypatch.setattr(grammars, "CACHED", 2)
    for choice in ("aa", "aa", "ab", "aa", "ac", "ab"):
        chat(caller, guided_choice=[choice])
    assert made == [f'start: "{choice}"' for choice in ("aa", "ab", "ac", "ab")]


def test_without_the_library_the_message_says_what_to_install(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"\[grammar\]") as refused:
        chat(live, guided_choice=["only here"])
    assert (refused.value.param, refused.value.code) == ("guided_choice", "unsupported_parameter")


def test_a_grammar_that_is_too_much_work(caller: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds for its first token are spent beside the engine; what each token costs is counted."""
    with caller.http() as http:

        def refuse(**fields: Any) -> Any:
            body = {"model": NAME, "messages": TURNS} | fields
            return problem(http.post(CHAT, json=body), 400)

        told = refuse(guided_grammar="start: start")
        assert (told["code"], told["param"]) == ("grammar_too_complex", "guided_grammar")
        with monkeypatch.context() as patched:
            patched.setattr(grammars, "PER_TOKEN", -1.0)
            assert refuse(guided_choice=["slow"])["code"] == "grammar_too_complex"
    assert chat(caller, guided_choice=["quick"]).message.content == "quick"
    caller.wait_idle()


def test_a_grammar_that_cannot_go_on_ends_its_request_alone(
    caller: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = grammars.MatcherConstraint.failed
    assert isinstance(plain, property)
    fails = property(lambda self: True)
    with monkeypatch.context() as patched:
        patched.setattr(grammars.MatcherConstraint, "failed", fails)
        with pytest.raises(openai.BadRequestError) as refused:
            chat(caller, guided_choice=["broken"], n=2)
    assert refused.value.code == "grammar_too_complex"
    assert chat(caller, guided_choice=["ok"]).message.content == "ok"
    caller.wait_idle()
