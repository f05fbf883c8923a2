"""The page at ``/`` of a server of images or sounds."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from mor.server.playground import CLASSIFY_PAGE, page_response

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The playground page."""
    return page_response(CLASSIFY_PAGE, request.app.state.mor.loop.config.num_recursions)
