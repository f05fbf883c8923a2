"""How exactly a folded model starts: full rank against the source, routed against recursive.

    python benchmarks/uptrain/fold_start.py MODEL --text FILE

MODEL is a vanilla folder (`mor convert`), FILE held-out text. Prints, for R = 2 and 3 under
middle_cycle from evenly spaced layers: the largest difference of a logit between the full-rank fold
and the source without its thinned layers, over one sequence; and the NLL of the recursive and of
every routed fold with how far gates are from 1. No timing, so a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from mor import MoRForCausalLM
from mor.eval.folds import text_sequences
from mor.eval.passes import run_pass
from mor.folder.tokenizer import load_tokenizer
from mor.hf.fold.fold import fold
from mor.hf.fold.plan import Folding, layer_map
from mor.hf.load import load_model


def logits(model: MoRForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """[1, T, V]."""
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # thinning is meant
    source = load_model(args.model)
    rows = text_sequences(
        args.text,
        load_tokenizer(args.model),
        args.seq_len,
        args.seq_len * args.sequences,
        source.config,
    )
    ids = rows[0]["input_ids"][None]
    for recursions in (2, 3):
        folding = Folding(recursions, relaxation="lora", rank=None)
        found = logits(fold(source, folding), ids)
        # One recursion with as many layers in the middle: the source without the thinned ones.
        left = len(layer_map(source.config, folding)["stack"])
        expected = logits(fold(source, Folding(1, num_recursion_layers=left - 2)), ids)
        worst = float((found - expected).abs().max())
        print(f"R={recursions} full rank: logits differ by {worst:.1e} at most", flush=True)
        for router in ("fixed", "threshold", "expert_choice", "token_choice"):
            model = fold(source, Folding(recursions, router=router))
            nll, near = run_pass(model, rows, len(rows), 1, "causal").nll, ""
            if router != "fixed":
                with torch.inference_mode():
                    traces = model(ids, use_cache=False, output_router_traces=True).traces
                far = torch.cat([(t.scores.gate - 1).abs().flatten() for t in traces])
                near = f", |g - 1| at most {float(far.max()):.1e}, median {float(far.median()):.1e}"
            print(f"R={recursions} {router}: NLL {nll:.4f}{near}", flush=True)


if __name__ == "__main__":
    main()
