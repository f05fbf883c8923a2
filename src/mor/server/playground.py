"""The page at ``/``: one file without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from mor.report.colors import depth_css
from mor.server.state import get_state

router = APIRouter()
PAGE = Path(__file__).with_name("page.html")
SHARED = Path(__file__).with_name("shared.js")
CLASSIFY_PAGE = Path(__file__).with_name("classify.html")


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The playground page."""
    return page_response(PAGE, get_state(request).engine.config.num_recursions)


def page_response(path: Path, recursions: int) -> Response:
    """A page with the colours of ``recursions`` depths and a policy that allows just it."""
    text, policy = _page(path, recursions)
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(text, headers=headers)


@lru_cache(8)
def _page(path: Path, recursions: int) -> tuple[str, str]:
    """The page with the colours of ``recursions`` depths, and the policy that allows just it."""
    colors = (
        depth_css(recursions)
        + "\n@media (prefers-color-scheme: dark) {\n"
        + depth_css(recursions, dark=True)
        + "\n}"
    )
    text = path.read_text("utf-8").replace("/* depth colours */", colors)
    text = text.replace("/* what all pages share */", SHARED.read_text("utf-8"))
    script, style = (_digest(text, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _digest(text: str, tag: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert found, f"the page has no <{tag}>"
    digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    return f"'sha256-{digest}'"
