"""Errors as clients of the OpenAI API know them: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mor.engine.intake import TooLong
from mor.errors import MorError
from mor.server.schema.basics import MISSING, Refusal

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_FORMS = {"TokenizeText", "TokenizeChat"}  # of a body, which are no fields
_UNION_TAGS = {"str", "int", "float", "bool", "none"}
_MODELS = {"ToolChoice"}  # of unions: what they hold is told as if they were not there
_BRIEF = reprlib.Repr()  # it looks at the beginning of a value only, however large that is
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 200
# What the engine calls it, and what the API does.
_FIELDS = {"max_depth": "depth_cap"}


class ErrorBody(BaseModel):
    """What went wrong. ``param`` names the field, ``code`` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that is no 2xx."""

    error: ErrorBody


class ApiError(Exception):
    """An answer that is no 2xx.

    Args:
        status: of HTTP.
        message: one sentence: what was found and what would be right.
        param: the field.
        code: a word for programs.
        headers: more headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as the API's JSON object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        body = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": body}

    def response(self) -> Response:
        """The answer. Escaped, since a message may quote what is not a valid character."""
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, self.headers, media_type="application/json")


def explain_refusal(error: MorError) -> ApiError:
    """A request that the engine refuses: the client's mistake, in the API's words."""
    message = str(error)
    if isinstance(error, TooLong):
        return ApiError(400, message, param="prompt", code="context_length_exceeded")
    found = re.match(r"(\w+)(?:=|\[|: | names | holds )", message)
    param = found[1] if found else None
    if param in _FIELDS:
        message, param = message.replace(param, _FIELDS[param], 1), _FIELDS[param]
    return ApiError(400, message, param=param, code="invalid_value")


def explain_grammar(param: str | None = None) -> ApiError:
    """A grammar that compiled, and is too much work to follow."""
    return ApiError(
        400,
        "The grammar of the answer is too much work to follow",
        param=param,
        code="grammar_too_complex",
    )


def too_long(param: str, found: str, most: int) -> ApiError:
    """A prompt that does not fit, whatever else is asked for."""
    what = "prompt" if param == "prompt" else "chat"
    return ApiError(
        400,
        f"The {what} {found}; together with the answer at most {most} tokens fit",
        param=param,
        code="context_length_exceeded",
    )


def explain_unreadable(error: RequestValidationError) -> ApiError:
    """A body whose fields are unknown, missing, of a wrong type or range."""
    problems = error.errors()
    for problem in problems:
        ours = problem.get("ctx", {}).get("error")
        if isinstance(ours, Refusal):
            return _explain_ours(problem["loc"], ours)
    first = problems[0]
    kind, place = first["type"], first["loc"]
    if (
        kind == "value_error" and len(place) == 1
    ):  # of our own checks, whose first word is the field
        message = first["msg"].removeprefix("Value error, ")
        return ApiError(400, message, param=message.split()[0], code="invalid_value")
    param = _path(place)
    if param is None:
        return ApiError(400, "The body must be one JSON object", code="invalid_body")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown field: {param}", param=param, code="unknown_field")
    if kind == "missing":
        return ApiError(400, f"Missing field: {param}", param=param, code="missing_field")
    # Each form that a field may have tells its own reason.
    reasons = dict.fromkeys(
        p["msg"].removeprefix("Value error, ") for p in problems if p["loc"][:2] == place[:2]
    )
    value = _BRIEF.repr(first.get("input")).encode("ascii", "backslashreplace").decode()
    value = value if len(value) <= 80 else value[:77] + "..."
    right = "; or: ".join(list(reasons)[:4])
    return ApiError(400, f"{param}: {right} (found {value})", param=param, code="invalid_value")


def _explain_ours(place: tuple[Any, ...], found: Refusal) -> ApiError:
    """What a validator of ours refused, with the field that it names."""
    param = _path((*place, *((found.field,) if found.field else ())))
    start = f"Missing field: {param}; " if found.code == MISSING else f"{param}: "
    return ApiError(400, start + found.message, param=param, code=found.code)


def _path(place: tuple[Any, ...]) -> str | None:
    """``("body", "messages", 0, "role")`` -> ``messages[0].role``, without names of union forms."""
    path = ""
    for part in place[2 if place[1:2] and place[1] in _FORMS else 1 :]:
        if part in _MODELS:
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _UNION_TAGS or not part.isidentifier():
            if path:
                break
            return ascii(part)[1:-1][:80]  # an unknown field may be called anything
        else:
            path += f".{part}" if path else part
    return path.removeprefix(".") if path and path[0] != "[" else None


def add_handlers(app: FastAPI) -> None:
    """Let every error of ``app`` be shaped like this."""

    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def wrong(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return explain_unreadable(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{request.method} {request.url.path}: {message}"
        headers = error.headers
        return ApiError(error.status_code, message, code=code, headers=headers).response()

    async def ours(request: Request, error: Exception) -> Response:
        return ApiError(500, "The server made a mistake; its log says which", code=None).response()

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(RequestValidationError, wrong)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, ours)
