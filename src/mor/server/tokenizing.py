"""``/tokenize``, ``/detokenize`` and ``/version``, as vLLM has them."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request

import mor
from mor.errors import MorError
from mor.server.bodies import JsonRoute
from mor.server.errors import ApiError, explain_refusal
from mor.server.routes import describe_errors
from mor.server.schema.responses import DetokenizeResponse, TokenizeResponse, Version
from mor.server.schema.tokenize import DetokenizeRequest, TokenizeRequest, TokenizeText
from mor.server.shaping import encode_turns
from mor.server.state import State, get_state

router = APIRouter(route_class=JsonRoute)


@router.get("/version")
async def version() -> Version:
    """The version of this package."""
    return Version(version=mor.__version__)


@router.post("/tokenize", responses=describe_errors(400, 401, 404, 413))
async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeResponse:
    """Token ids of a text or a chat."""
    state = get_state(request)
    if body.model is not None:
        state.check_model(body.model)
    ids: Sequence[int]
    if isinstance(body, TokenizeText):
        ids = await _encode(body, state)
    else:
        ids = await encode_turns(body, state, _most(state))
    names = [state.tokens.piece(token)[0] for token in ids] if body.return_token_strs else None
    return TokenizeResponse(
        count=len(ids),
        max_model_len=state.engine.max_model_len,
        tokens=list(ids),
        token_strs=names,
    )


def _most(state: State) -> int:
    """Tokens that are counted: a text that does not fit too, but not without a bound."""
    return max(8 * state.engine.max_model_len, 1 << 16)


async def _encode(body: TokenizeText, state: State) -> tuple[int, ...]:
    if not body.prompt:
        return ()  # what a completion would refuse
    try:
        if body.add_special_tokens is False:
            return await state.tokens.encode_plain(body.prompt, _most(state))
        (ids,) = await state.tokens.encode([body.prompt], _most(state))
    except MorError as error:
        problem = explain_refusal(error)
        problem.param = "prompt"
        raise problem from None
    return ids


@router.post("/detokenize", responses=describe_errors(400, 401, 404, 413))
async def detokenize(request: Request, body: DetokenizeRequest) -> DetokenizeResponse:
    """The text of token ids, special tokens included."""
    state = get_state(request)
    if body.model is not None:
        state.check_model(body.model)
    vocabulary = state.engine.config.vocab_size
    for token in body.tokens:
        if token >= vocabulary:
            raise ApiError(
                400,
                f"tokens holds token id {token}; vocab_size={vocabulary} allows "
                f"0..{vocabulary - 1}",
                param="tokens",
                code="invalid_value",
            )
    return DetokenizeResponse(prompt=await state.tokens.show(body.tokens))
