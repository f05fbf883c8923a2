"""All that serving needs checked and timed on a GPU, in one command.

    python benchmarks/gpu/serving.py                 # on the GPU at hand, about 9 minutes
    python benchmarks/gpu/serving.py --device cpu    # the same steps at a toy size, to try it out

1. Correctness: every form of attention over pages that can run here, against float32 on the CPU.
   Then small models of every router and KV mode, in float32. Greedy tokens and depths of the engine
   on the device, with the form that it chooses there, equal ``model.generate`` and the whole
   forward on the same device: once as stages over static buffers, which are graphs on a GPU and are
   read a tick late, once operator after operator. Nothing is timed when one of them differs.
2. The paper's protocol at the 360M shape in bfloat16: passes of 32 tokens, R = 2, 3, 4 against
   vanilla (and vanilla of 34 layers, as R = 4 has) on the same engine, every cost included.
3. A saturating load: 256 clients, passes of 128 tokens.
4. The paper's protocol with its larger passes of 42, 48 and 51 tokens.

Before 2 to 4 the tokens of the very models are compared once more, in float32 on the device.
Answers have 128 tokens in the mean, half of the paper's; ``--scale 1`` is the paper's length.
``--minutes`` ends the run after the system that is being timed then; what was measured is kept. At
9 minutes it ends in any case, and says where it was.
Results are appended to ``runs/bench/gpu_serving.jsonl``.

What is timed is what the engine chooses on the device; its form of attention and whether stages
are static stand in the log that ``--log`` shows. The cost model's bound counts products only.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from mor import MoRConfig, MoRForCausalLM
from mor.bench.checks import KV_MODES, ROUTERS, Checks
from mor.bench.device import label, parse_device
from mor.bench.forms import check_forms
from mor.bench.serve import Settings, run_serve
from mor.bench.specs import parse_spec
from mor.bench.systems import greedy, reference_tokens
from mor.bench.tables import notes, rich_tables
from mor.bench.workload import Lengths, Workload, make_workload
from mor.engine import Engine, RequestOutput
from mor.errors import MorError

ROOT = Path(__file__).parents[2]
OUT = ROOT / "runs/bench/gpu_serving.jsonl"
# The paper's "relative maximum" batch sizes, by R.
RELATIVE = ((2, 42), (3, 48), (4, 51))
VOCABULARY, NEW = 97, 8


def small_model(router: str, kv_sharing: str) -> MoRForCausalLM:
    """Random, with boundaries that let some tokens through; the same for the same arguments."""
    torch.manual_seed(0)
    config = MoRConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_recursions=3,
        num_recursion_layers=2,
        router=router,
        kv_sharing=kv_sharing,
        router_alpha=0.7,
        initializer_range=0.2,
    )
    model = MoRForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.normal_(0.0, 0.5)
        model.train()
        for _ in range(3):  # boundaries are statistics of training
            model(torch.randint(VOCABULARY, (4, 12)))
            model.model.router.finish_step()
    return model.eval()


def check_engine(device: torch.device, static: bool, router: str, kv_sharing: str) -> None:
    """Prompts of unequal lengths, chunks, and few pages to give way.

    Raises:
        MorError: an answer is not that of the request alone.
    """
    model = small_model(router, kv_sharing)
    model.to(device)
    draw = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(VOCABULARY, (length,), generator=draw).tolist()
        for length in (1, 40, 3, 17, 9)
    ]
    # On the CPU the plain form: what it is given there is what kernels are given on a GPU.
    engine = Engine(
        model, max_num_seqs=4, max_residents=5, prefill_chunk=11, page_size=4, max_model_len=64,
        attention="plain" if device.type == "cpu" else "auto", static_stages=static,
    )  # fmt: skip
    seen: set[int] = set()
    for output in engine.generate(prompts, greedy(NEW)):
        seen |= check_output(model, output)
    engine.check_integrity()
    if router != "fixed" and len(seen) < 2:
        raise MorError("all tokens ran the same depth, so nothing was mixed")
    print(f"   depths {sorted(seen)}", flush=True)


def check_output(model: MoRForCausalLM, output: RequestOutput) -> set[int]:
    """The depths that occur; tokens and depths have to be those of the request alone."""
    prompt, (done,) = output.prompt_token_ids, output.completions
    wanted = reference_tokens(model, prompt, NEW)
    if list(done.token_ids) != wanted:
        raise MorError(f"wrote {list(done.token_ids)}, generate writes {wanted}")
    ids = torch.tensor([[*prompt, *wanted[:-1]]], device=model.device)
    with torch.inference_mode():
        depths = model(ids, use_cache=False, routing="causal").depths[0].tolist()
    # The first new token was sampled from the prompt's last place, which both lists hold.
    found = [*done.prompt_depths, *done.depths[1:]]
    if found != depths or done.depths[0] != done.prompt_depths[-1]:
        raise MorError(f"depths {found}, the whole forward runs {depths}")
    return set(depths)


def workloads(toy: bool, scale: float, vocabulary: int) -> tuple[Workload, ...]:
    """The paper's protocol, a saturating load, the protocol at its larger passes: in this order."""
    lengths = Lengths(scale=0.03 if toy else scale)
    few, many = (6, 8) if toy else (256, 512)
    passes = 3 if toy else 32
    relative = tuple((r, 4) for r, _ in RELATIVE) if toy else RELATIVE
    clients, width = (6, 4) if toy else (256, 128)
    return (
        make_workload("protocol", few, passes, vocabulary, lengths),
        make_workload("paper", many, clients, vocabulary, lengths, pass_tokens=width),
        make_workload("protocol", few, passes, vocabulary, lengths, relative=relative),
    )


def until(deadline: float) -> Callable[[str], None]:
    """Prints what goes on; after ``deadline`` it ends the timing as an interruption would."""

    def say(line: str) -> None:
        print(line, flush=True)
        if ", round " in line and time.monotonic() > deadline:
            print("the time of --minutes is over", flush=True)
            raise KeyboardInterrupt

    return say


def main() -> None:
    """Check, then time."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=0.5, help="of 256 tokens in the mean")
    parser.add_argument("--minutes", type=float, default=8.5, help="of all steps, about")
    parser.add_argument(
        "--out", type=Path, help=f"JSON lines; default runs/bench/{OUT.name}, on a GPU only"
    )
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--log", action="store_true", help="the engine's choices")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO if args.log else logging.WARNING)
    try:
        device = parse_device(args.device)
    except MorError as error:
        parser.error(f"{error}, to try the steps out")
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = Checks()
    checks.run("forms", check_forms, device, lambda line: print(line, flush=True))
    for static, router, kv_sharing in itertools.product((True, False), ROUTERS, KV_MODES):
        name = f"engine, {router}, KV {kv_sharing}, {'static' if static else 'plain'} stages"
        checks.run(name, check_engine, device, static, router, kv_sharing)
    checks.finish()
    if args.checks_only:
        return
    toy = device.type == "cpu"
    names = ("vanilla", "vanilla@8" if toy else "vanilla@34", "mor2", "mor3", "mor4")
    settings = Settings(
        shape="tiny" if toy else "360m",
        specs=tuple(parse_spec(name) for name in names),
        workloads=workloads(toy, args.scale, 320 if toy else 49152),
        rounds=1 if toy else args.rounds,
        out=args.out or (None if toy else OUT),
        device=device,
        dtype=torch.bfloat16,
        threads=1 if toy else torch.get_num_threads(),
    )
    # Kept for the run that is under way then, and for the rates, which are measured again.
    results = run_serve(settings, until(began + 60 * args.minutes - 45))
    console = Console(highlight=False, width=150)
    for table in rich_tables(results):
        console.print(table)
    for line in (*notes(results), f"ours: {label(device, settings.dtype)}"):
        console.print(line, markup=False)
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    # Whatever hangs on a device is no longer waited for; whoever lends it stops at ten minutes.
    faulthandler.dump_traceback_later(540, exit=True, file=sys.__stderr__)
    try:
        main()
    finally:
        faulthandler.cancel_dump_traceback_later()
