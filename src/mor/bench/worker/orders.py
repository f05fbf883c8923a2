"""Orders, one per line of standard input, each answered by one line."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from .fake import Fake
from .llamacpp import LlamaCpp
from .openvino import OpenVINO
from .peer import Peer, Trace, clock
from .static import Transformers
from .vllm import VLLM

PEERS: dict[str, type[Peer]] = {
    "openvino": OpenVINO,
    "vllm": VLLM,
    "llamacpp": LlamaCpp,
    "transformers": Transformers,
    "fake": Fake,
}


def obey(order: dict[str, Any], kind: str, peer: Peer | None) -> tuple[dict[str, Any], Peer | None]:
    """One order: its answer, and the peer as it is then."""
    if order["do"] == "load":
        peer = PEERS[kind](order)  # type: ignore[call-arg]
        return {"versions": peer.versions, "details": peer.details}, peer
    if order["do"] != "run" or peer is None:
        raise ValueError(f"cannot do {order['do']!r}, loaded: {peer is not None}")
    traces = [Trace(request) for request in order["requests"]]
    began = clock()
    peer.run(traces, order["concurrency"])
    measured = [trace.as_json() for trace in traces]
    return {"began": began, "ended": clock(), "traces": measured}, peer


def main() -> None:
    """Read orders until there are none. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        try:
            answer, peer = obey(json.loads(line), sys.argv[1], peer)
            answer = {"ok": True} | answer
        except Exception as error:  # a peer's library raises whatever it likes
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
