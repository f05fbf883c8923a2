"""Use an installed ``mor`` as a newcomer would, from text to an answer over HTTP.

``tools/smoke_test.sh`` runs this with the Python of an environment that has the package. Every step
is a command of its own in a folder of its own, so that nothing of a checkout is used.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

RECIPE = """
name: smoke
model: {hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_key_value_heads: 1,
        num_recursions: 2, num_recursion_layers: 1, max_position_embeddings: 64, router: threshold}
data: {path: data, seq_len: 16}
train: {budget: {steps: 4}, batch_size: 2, learning_rate: 1.0e-3, logging_steps: 1,
        eval_sequences: 2, report_to: []}
output: runs
"""
LOAD = """
import mor
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("runs/smoke/model")
tokenizer = AutoTokenizer.from_pretrained("runs/smoke/model")
ids = tokenizer("the king", return_tensors="pt").input_ids
text = model.generate(ids, max_new_tokens=4, do_sample=False)
assert text.shape[1] > ids.shape[1], text.shape
print("loaded by Transformers:", mor.__version__, mor.__file__)
"""
PATIENCE_S = 120.0


def run(*words: str) -> str:
    """Run a command to its end and return what it printed; stop here where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        sys.exit(f"smoke test: {' '.join(words[:6])} ended with {done.returncode}")
    print("ok:", " ".join(words[:5]).replace("\n", " ")[:72], flush=True)
    return done.stdout


def mor(*words: str) -> str:
    """Run the command ``mor`` of this environment."""
    return run(sys.executable, "-m", "mor_command", *words)


def ask(url: str, body: dict[str, object], server: subprocess.Popen[bytes]) -> dict[str, object]:
    """Post ``body`` once the server answers; stop here where it ends or never does."""
    until = time.monotonic() + PATIENCE_S
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: dict[str, object] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            sys.exit(f"smoke test: {url} answered {error.code}: {error.read()!r}")
        except OSError:
            if server.poll() is not None or time.monotonic() > until:
                sys.exit(f"smoke test: mor serve ended or never answered ({server.poll()})")
            time.sleep(0.2)


def serve() -> None:
    """One request to a server of the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mor_command", "serve", "runs/smoke", "--port", str(port)]
    with subprocess.Popen([*words, "--log-level", "warning"]) as server:
        try:
            body: dict[str, object] = {"model": "smoke", "prompt": "the king", "max_tokens": 4}
            answer = ask(f"http://127.0.0.1:{port}/v1/completions", body, server)
            assert answer["usage"], answer
            print("ok: one request to mor serve", flush=True)
        finally:
            server.terminate()


def main() -> None:
    """Import, prepare, train, evaluate, generate, load with Transformers, serve."""
    with tempfile.TemporaryDirectory(prefix="mor-smoke-") as folder:
        os.chdir(folder)
        Path("texts").mkdir()
        for number in range(12):
            lines = f"{number} the king said to my lord of the night: thou art crown {number}. "
            Path("texts", f"{number}.txt").write_text(lines * 8, encoding="utf-8")
        Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
        print("version", mor("--version").strip())
        assert "demo/threshold" in mor("recipes")
        mor("data", "prepare", "texts", "--out", "data", "--vocab-size", "300",
            "--validation-fraction", "0.2")  # fmt: skip
        mor("train", "recipe.yaml")
        mor("generate", "runs/smoke", "--prompt", "the king", "--max-new-tokens", "4")
        print(run(sys.executable, "-c", LOAD).strip())
        serve()
        os.chdir("/")  # some systems remove no folder that a process is in
    print("the package works")


if __name__ == "__main__":
    main()
