"""llama.cpp's server, in this process."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .peer import Peer, Trace, clock, library, versions

KINDS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
# Names as mor.hf.convert.gguf has them; this file runs where mor is not installed.
LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class LlamaCpp(Peer):
    """llama.cpp with continuous batching, spoken to over its own HTTP, as its users do.

    The variant is the type of the weights: ``float32``, ``bfloat16``, or ``int8`` (Q8_0);
    ``-f32cache`` behind it keeps keys and values in float32, where llama.cpp's own choice is
    float16.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        weights, _, cache = order["variant"].partition("-")
        if weights not in KINDS or cache not in ("", "f32cache"):
            raise ValueError(f"variant {order['variant']!r} is not known; use {', '.join(KINDS)}")
        file = write_gguf(Path(order["folder"]), Path(order["cache"]), weights)
        cpp = library("xllamacpp")
        params = cpp.CommonParams()
        params.model.path = str(file)
        params.n_parallel, params.n_gpu_layers = order["max_num_seqs"], 0
        params.n_ctx = order["max_num_seqs"] * order["max_model_len"]
        params.cache_prompt, params.port = False, 0
        if order.get("threads"):
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order["threads"]
        if cache:
            params.cache_type_k = params.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
        self.server = cpp.Server(params)
        self.address = self.server.listening_address.removeprefix("http://")
        self.versions = versions("xllamacpp", "gguf")
        self.details = {"weights": weights, "cache": cache or "float16", "batching": "slots"}

    def run(self, traces: list[Trace], concurrency: int) -> None:
        """Closed loop: so many clients, each on a connection of its own."""
        with ThreadPoolExecutor(concurrency) as clients:
            list(clients.map(self._ask, traces))

    def _ask(self, trace: Trace) -> None:
        asked = {
            "prompt": trace.prompt,
            "n_predict": trace.new_tokens,
            "temperature": 0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "return_tokens": True,
        }
        connection = http.client.HTTPConnection(self.address)
        trace.sent = clock()
        connection.request(
            "POST", "/completion", json.dumps(asked), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"llama.cpp answered {answer.status}: {answer.read()[:500]!r}")
        for line in answer:
            if line.startswith(b"data: {"):
                piece = json.loads(line[6:])
                if not piece.get("stop"):
                    trace.got(piece["tokens"])
        connection.close()


def write_gguf(source: Path, cache: Path, weights: str) -> Path:
    """The Llama folder as a GGUF file, made once; its tokens are numbers, for ids go in and out."""
    target = cache / f"llamacpp-{weights}.gguf"
    if target.is_file():
        return target
    gguf, numpy = library("gguf"), library("numpy")
    config = json.loads((source / "config.json").read_text("utf-8"))
    heads, width = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or width // heads
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(target.with_suffix(".part"), "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{number}" for number in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    kind = gguf.GGMLQuantizationType[KINDS[weights]]
    with library("safetensors").safe_open(source / "model.safetensors", "np") as file:
        names = file.keys()  # no mapping
        for name in names:
            values = file.get_tensor(name).astype(numpy.float32)
            if "q_proj" in name or "k_proj" in name:  # pairs of a rotation side by side
                pairs = values.reshape(-1, 2, size // 2, width)
                values = numpy.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
            own = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
            values = gguf.quants.quantize(values, own)
            writer.add_tensor(stored_name(name), values, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target.with_suffix(".part").rename(target)


def stored_name(name: str) -> str:
    """llama.cpp's name of one of Transformers' tensors."""
    stem, _, last = name.rpartition(".")
    if stem in OTHERS:
        return f"{OTHERS[stem]}.{last}"
    _, _, number, layer = stem.split(".", 3)
    return f"blk.{number}.{LAYERS[layer]}.{last}"
