"""A server on a tiny random model, alive in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx
import torch
from openai import OpenAI

from mor import MoRForCausalLM
from mor.data.tokenizer import train_tokenizer
from mor.engine import Engine
from mor.server import DrainingServer, EngineLoop, create_app, make_server
from tests.strategies import make_model, small_config

NAME = "tiny"
TEXTS = ["the king said to the queen: naïve – 東京 🙂🙂", "thou art the crown of my lord"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('a chat begins with the user') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

TOOL_TEMPLATE = (  # as Qwen's and Hermes', in short
    "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}"
    "go between <tool_call> and </tool_call> {% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if mood %}{{ mood }} {% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


@cache
def model(positions: int = 128) -> MoRForCausalLM:
    """Float64, so that answers do not depend on the batch."""
    config = small_config(
        "threshold",
        vocab_size=len(tokenizer()),
        bos_token_id=0,
        eos_token_id=0,
        max_position_embeddings=positions,
    )
    return make_model(config, 3).to(torch.float64)


def make_engine(positions: int = 128, **options: Any) -> Engine:
    settings: dict[str, Any] = {"max_num_seqs": 4, "page_size": 4, "prefill_chunk": 16}
    return Engine(model(positions), tokenizer(), **settings | options)


@dataclass
class Live:
    """A running server."""

    url: str
    server: DrainingServer
    loop: EngineLoop
    engine: Engine
    clients: list[OpenAI] = field(default_factory=list)

    def openai(self, **options: Any) -> OpenAI:
        """The client that most users have; closed with the server at the latest."""
        settings: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 60.0}
        self.clients.append(OpenAI(base_url=f"{self.url}/v1", **settings | options))
        return self.clients[-1]

    def http(self, **options: Any) -> httpx.Client:
        """For what that client would never send."""
        return httpx.Client(base_url=self.url, timeout=60.0, **options)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with self.http() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith((f"{name}{{", f"{name} "))
        )

    def wait_idle(self, seconds: float = 30.0) -> None:
        """Until nothing is under way; then all pages are free."""
        end = time.monotonic() + seconds
        while self.loop.under_way and time.monotonic() < end:
            time.sleep(0.005)
        assert self.loop.under_way == 0
        assert self.metric("mor:kv_cache_usage_perc") == 0
        assert self.metric("mor:num_requests_running") == 0


@contextmanager
def serving(engine: Engine | None = None, **options: Any) -> Iterator[Live]:
    """A server for the time of the block; options are those of ``create_app``."""
    engine = make_engine() if engine is None else engine
    settings = {"chat_template": TEMPLATE} | options
    drain = settings.pop("drain_seconds", 5.0)
    app = create_app(engine, NAME, **settings)
    server = make_server(app, port=0, drain_seconds=drain, log_level="error")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    live = Live(f"http://127.0.0.1:{port}", server, app.state.mor.loop, engine)
    try:
        yield live
    finally:
        for client in live.clients:
            client.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
