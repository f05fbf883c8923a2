"""The page at ``/`` in a real Chromium."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.live import Live, make_engine, serving

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: make test-browser")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(BROWSERS)} in PATH")
    with sync_api.sync_playwright() as playwright:
        # Root, as in a container, has no sandbox.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = playwright.chromium.launch(executable_path=found, args=options)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which no script may fail and no policy be broken."""
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda line: line.type == "error" and "Failed to load" not in line.text
        and problems.append(line.text),
    )  # fmt: skip
    yield page
    page.close()
    assert not problems


def settle(page: Any, state: str) -> None:
    # By a selector: the page's policy forbids to evaluate a text as script, the test's too.
    page.wait_for_selector(f"#state:text-is('{state}')")


def test_a_text_streams_with_the_depth_of_each_token(live: Live, page: Any) -> None:
    page.goto(live.url)
    page.wait_for_selector("#legend span")
    assert page.locator("#legend span").all_text_contents() == ["0", "1", "2", "3"]
    page.fill("#prompt", "the king")
    page.fill("#most", "24")
    page.fill("#seed", "1")
    page.check("#eos")
    page.click("#go")
    settle(page, "done (most tokens)")
    tokens = page.locator("#out .t")
    depths = [int(d) for d in tokens.evaluate_all("all => all.map(t => t.dataset.depth)")]
    answer = live.openai().completions.create(
        model="tiny", prompt="the king", max_tokens=24, seed=1, temperature=0.8,
        extra_body={"ignore_eos": True, "depth_cap": 3},
    ).choices[0]  # fmt: skip
    assert depths == answer.depths  # type: ignore[attr-defined]
    assert len(set(depths)) > 1
    assert page.locator("#out").text_content() == "the king" + answer.text
    colors = tokens.evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")
    assert len(set(zip(depths, colors, strict=True))) == len(set(depths)) == len(set(colors))
    assert page.text_content("#mean") == f"{sum(depths) / 24:.2f} of 3"
    assert float(page.text_content("#rate")) > 0
    page.emulate_media(color_scheme="dark")
    dark = tokens.evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")
    assert set(dark) != set(colors)


def test_the_depth_cap(live: Live, page: Any) -> None:
    page.goto(live.url)
    page.wait_for_selector("#legend span")
    page.fill("#prompt", "the king")
    page.fill("#most", "12")
    page.check("#eos")
    page.locator("#cap").fill("1")
    assert page.text_content("#cap-now") == "1"
    page.click("#go")
    settle(page, "done (most tokens)")
    depths = page.locator("#out .t").evaluate_all("all => all.map(t => t.dataset.depth)")
    assert set(depths) == {"1"}


def test_stop_frees_the_pages(browser: Any) -> None:
    engine = make_engine()
    step = engine.step

    def slow() -> Any:
        time.sleep(0.02)
        return step()

    engine.step = slow  # type: ignore[method-assign]
    with serving(engine) as live:
        page = browser.new_page()
        page.goto(live.url)
        page.wait_for_selector("#legend span")
        page.fill("#prompt", "the")
        page.fill("#most", "120")
        page.check("#eos")
        page.click("#go")
        page.wait_for_selector("#out .t")
        assert live.loop.under_way == 1
        page.click("#stop")
        settle(page, "stopped")
        assert page.is_enabled("#go")
        live.wait_idle(1.0)
        assert page.locator("#out .t").count() < 110
        page.close()


def test_a_chat_keeps_its_turns(live: Live, page: Any) -> None:
    page.goto(live.url)
    page.wait_for_selector("#legend span")
    page.check("#chat-mode")
    page.fill("#most", "5")
    page.check("#eos")
    for number, text in enumerate(("who?", "what?"), 1):
        page.fill("#prompt", text)
        with page.expect_request("**/v1/chat/completions") as sent:
            page.click("#go")
        settle(page, "done (most tokens)")
        assert len(sent.value.post_data_json["messages"]) == 2 * number - 1
    assert page.locator("#out .who").all_text_contents() == ["you", "tiny"] * 2
    assert page.locator("#out .t").count() == 10


def test_a_server_with_a_key(browser: Any) -> None:
    with serving(api_keys=["secret"]) as live:
        page = browser.new_page()
        page.goto(live.url)
        page.wait_for_selector("#key-row:not([hidden])")
        page.fill("#key", "secret")
        page.locator("#key").blur()
        page.wait_for_selector("#legend span")
        page.fill("#most", "3")
        page.click("#go")
        page.wait_for_selector("#out .t")
        page.close()


def test_what_the_server_refuses_is_told(live: Live, page: Any) -> None:
    page.goto(live.url)
    page.wait_for_selector("#legend span")
    page.evaluate("document.getElementById('form').noValidate = true")
    page.fill("#most", "5000")
    page.fill("#prompt", "the")
    page.click("#go")
    settle(page, "failed")
    assert "at most 128 fit" in page.text_content("#problem")


def test_the_page_needs_nothing_from_elsewhere(live: Live) -> None:
    with live.http() as client:
        answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http://" not in answer.text
    assert "https://" not in answer.text
