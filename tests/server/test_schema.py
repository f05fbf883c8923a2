"""Requests made from the server's own schema, right ones and wrong ones (schemathesis)."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.live import Live, make_engine, serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


# What is generated has fields of all kinds: a template that refuses none of them.
SHORT = "{{ messages[-1].content }}{% if tools %}<tool_call>{% endif %}:"


@pytest.fixture(scope="module")
def api() -> Any:
    # Small bounds: what is generated may ask for all that is allowed.
    with serving(make_engine(max_model_len=64), max_waiting=8, chat_template=SHORT) as live:
        yield schemathesis.openapi.from_url(f"{live.url}/openapi.json")


PATHS = {
    "/v1/completions": "post",
    "/v1/chat/completions": "post",
    "/v1/models": "get",
    "/v1/models/{model}": "get",
    "/health": "get",
    "/ready": "get",
    "/metrics": "get",
    "/version": "get",
    "/tokenize": "post",
    "/detokenize": "post",
}


def test_no_path_is_left_out(api: Any) -> None:
    assert {operation.ok().path for operation in api.get_all_operations()} == set(PATHS)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", PATHS)
def test_the_server_keeps_to_its_schema(api: Any, path: str, mode: GenerationMode) -> None:
    operation = api[path][PATHS[path]]
    if mode is GenerationMode.NEGATIVE and PATHS[path] != "post":
        return  # there is nothing to get wrong

    examples = 8 if "chat" in path else 16  # those of the largest schema take longest

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    def check(case: Any) -> None:
        answer = case.call_and_validate(checks=CHECKS)
        statuses.add(answer.status_code)

    statuses: set[int] = set()
    check()
    if mode is GenerationMode.POSITIVE and "{" not in path:
        assert 200 in statuses


def test_the_schema_names_every_error(live: Live) -> None:
    with live.http() as client:
        told = client.get("/openapi.json").json()
    responses = told["paths"]["/v1/completions"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "404", "413", "429", "500", "503"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "HTTPValidationError" not in str(told)
