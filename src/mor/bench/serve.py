"""One benchmark: make the systems, check them, time them in turn, record."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mor.bench.bound import PROMPT_ROWS
from mor.bench.check import check_ours, check_peer, references, sample_of
from mor.bench.device import CPU, dtype_name, explain_no_int8, gpu_name, label, plain
from mor.bench.export import export_llama
from mor.bench.forced import bench_config, bench_model
from mor.bench.peers import Peer, PeerError, python_of
from mor.bench.rates import Rates, measure_rates
from mor.bench.records import Results, Runs, System, record, write
from mor.bench.specs import Spec
from mor.bench.systems import EngineSystem
from mor.bench.trace import check_lengths
from mor.bench.workload import Workload
from mor.errors import MorError
from mor.hf.load import load_model
from mor.hf.modeling import MoRForCausalLM


@dataclass(frozen=True)
class Settings:
    """What a benchmark is to do.

    Attributes:
        shape: preset of the random models.
        specs: systems, in the order of the table.
        workloads: made by the caller.
        environments: of the peers, by name.
        rounds: turns over all systems.
        warm: requests of each workload that every system answers before it is timed.
        check_requests, check_tokens: how much is compared before timing.
        threads: of torch and of the peers.
        seed: of weights and exits.
        cache: folder for what is exported and converted; None for a temporary one.
        out: JSON lines; None for none.
        device, dtype: of our models; peers and 8-bit weights want float32 on the CPU.
    """

    shape: str
    specs: tuple[Spec, ...]
    workloads: tuple[Workload, ...]
    environments: dict[str, Path] = field(default_factory=dict)
    rounds: int = 3
    warm: int = 4
    check_requests: int = 3
    check_tokens: int = 16
    threads: int = 1
    seed: int = 0
    cache: Path | None = None
    out: Path | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @property
    def plain(self) -> bool:
        """Whether our models are what the peers are: float32 on the CPU."""
        return plain(self.device, self.dtype)


def run_serve(settings: Settings, say: Callable[[str], None] = lambda text: None) -> Results:
    """Check and time all systems; one record per system and workload.

    Args:
        settings: what to do.
        say: takes a line about what goes on.

    Raises:
        MorError: one of our systems writes something wrong, or nothing can be timed at all.
    """
    if settings.rounds < 1 or not settings.workloads or not settings.specs:
        raise MorError("rounds, workloads and systems: there must be at least one of each")
    torch.set_num_threads(settings.threads)
    results = Results(load=[os.getloadavg()[0]], device=gpu_name(settings.device))
    with contextlib.ExitStack() as stack:
        folder = settings.cache
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mor-bench-")))
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        ours = list(_ours(settings, results))
        base = next((s for s in ours if s.config.num_recursions == 1), None)
        peers = list(_peers(settings, base, folder, results, stack, say))
        order = [spec.name for spec in settings.specs]
        systems: list[System] = sorted([*ours, *peers], key=lambda s: order.index(s.name))
        if not systems:
            raise MorError(f"no system can run: {'; '.join(results.left_out.values())}")
        with _frozen(peers):
            _check(systems, base, settings, results, say)
        for one in ours:
            one.cast(settings.dtype)
        say("measuring the machine's rates")
        kinds = sorted({system.int8 for system in systems}) if ours else []
        rates = {int8: measure(ours, settings, int8) for int8 in kinds}
        runs: Runs = {}
        try:
            _time_all(systems, settings, results, say, runs)
        except KeyboardInterrupt:
            say("interrupted: what was measured until now is recorded")
        say("measuring the machine's rates again")
        rates = {k: found.better(measure(ours, settings, k)) for k, found in rates.items()}
        names = {False: dtype_name(settings.dtype), True: "int8"}
        results.rates = {names[int8]: found.record() for int8, found in rates.items()}
    results.load.append(os.getloadavg()[0])
    place = {"device": settings.device.type, "dtype": dtype_name(settings.dtype)}
    common = {"shape": settings.shape, "threads": settings.threads} | place
    record(systems, settings.workloads, runs, rates, results, common)
    if settings.out is not None:
        write(results, settings.out)
    return results


def _ours(settings: Settings, results: Results) -> Iterator[EngineSystem]:
    """Make our systems; of those with weights of 8 bits that cannot run here, note the reason."""
    for spec in settings.specs:
        if spec.kind == "peer":
            continue
        int8 = dict(spec.options).get("quantization") == "int8"
        if int8 and (why := explain_no_int8(settings.device, settings.dtype)):
            results.left_out[spec.name] = f"{spec.name}: {why}"
            continue
        yield make_ours(spec, settings)


def make_ours(spec: Spec, settings: Settings) -> EngineSystem:
    """One of our systems: random weights of a shape with forced exits, or a trained model.

    In float32 at first, in which its tokens are compared, and on its device.
    """
    options = dict(spec.options)
    if spec.folder is not None:
        trained: Any = load_model(spec.folder)
        trained.to(settings.device)
        return EngineSystem(spec.name, trained, forced=False, options=options)
    config = bench_config(settings.shape, spec.recursions, spec.layers, spec.family)
    model: Any = bench_model(config, settings.seed)
    model.to(settings.device)
    forced = spec.family == "mor" and options.get("policy") != "full_depth"
    return EngineSystem(spec.name, model, forced=forced, options=options)


def entry_bytes(model: MoRForCausalLM, itemsize: int = 4) -> int:
    """Bytes of one token's keys and values in all layers of a vanilla model."""
    config = model.config
    return int(
        2 * config.num_key_value_heads * config.head_dim * itemsize * config.num_hidden_layers
    )


def _peers(
    settings: Settings,
    base: EngineSystem | None,
    folder: Path,
    results: Results,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> Iterator[Peer]:
    """Start and load the peers, one after the other; of those that cannot, note the reason."""
    specs = [spec for spec in settings.specs if spec.kind == "peer"]
    source: Path | None = None
    for spec in specs:
        try:
            if not settings.plain:
                raise PeerError(
                    f"{spec.name}: peers run in float32 on the CPU, ours in "
                    f"{dtype_name(settings.dtype)} on {settings.device.type}; nothing to compare"
                )
            if base is None:
                raise PeerError(f"{spec.name}: no vanilla model among the systems to give to it")
            python = python_of(spec.peer, settings.environments)
            if source is None:
                config = base.config
                label = f"{settings.shape}-{config.num_hidden_layers}-{settings.seed}"
                source = folder / (
                    label if base.forced or base.name.startswith("vanilla") else base.name
                )
                source = export_llama(base.model, source / "llama")
            say(f"loading {spec.name}")
            peer = Peer(
                spec.name, spec.peer, spec.variant, python, source, source.parent,
                entry_bytes(base.model),
            )  # fmt: skip
            stack.callback(peer.close)
            peer.load(
                max(w.sizes(1, False)[0] for w in settings.workloads),
                max(w.longest for w in settings.workloads),
                settings.threads,
            )
        except PeerError as error:
            results.left_out[spec.name] = str(error)
            say(f"left out: {error}")
            continue
        peer.freeze()
        yield peer


@contextlib.contextmanager
def _frozen(peers: Sequence[Peer]) -> Iterator[None]:
    """Whatever happens within, peers stand still afterwards."""
    try:
        yield
    finally:
        for peer in peers:
            peer.freeze()


def _check(
    systems: list[System],
    base: EngineSystem | None,
    settings: Settings,
    results: Results,
    say: Callable[[str], None],
) -> None:
    """Every system against its reference, on the first requests of the first workload."""
    sample = sample_of(settings.workloads[0], settings.check_requests, settings.check_tokens)
    if settings.dtype != torch.float32:
        # Random weights magnify what bfloat16 rounds until any two orders of a sum differ in
        # tokens: there a difference means nothing, and neither does equality.
        say(
            f"tokens are compared in float32 on {gpu_name(settings.device) or 'the CPU'}; what is "
            f"timed then is {label(settings.device, settings.dtype)}"
        )
    peers = any(isinstance(system, Peer) for system in systems)
    wanted = references(base.model, sample) if base and peers else []
    for system in list(systems):
        if isinstance(system, Peer):
            assert base is not None
            try:
                checked = check_peer(system, base.model, sample, wanted)
            except PeerError as error:
                results.left_out[system.name] = str(error)
                systems.remove(system)
                say(f"left out: {error}")
                continue
            finally:
                system.freeze()
        else:
            checked = check_ours(system, sample)
        results.checks.append(checked)
        say(checked.sentence())


def measure(ours: list[EngineSystem], settings: Settings, int8: bool) -> Rates:
    """Rates at every row count that a pass or a gathering of these workloads can have."""
    most = max(
        w.sizes(s.config.num_recursions, s.saves_depth)[0] for s in ours for w in settings.workloads
    )
    usual = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    rows = {n for n in usual if n <= most} | {most, PROMPT_ROWS}
    # The tiny shape is for tests: nobody reads its rates.
    quick: dict[str, Any] = (
        {"seconds": 1e-3, "rotated_bytes": 2 << 20} if settings.shape == "tiny" else {}
    )
    model = ours[0].model
    configs = [s.config for s in ours]
    return measure_rates(configs, rows, model.device, model.dtype, int8=int8, **quick)


def _time_all(
    systems: list[System],
    settings: Settings,
    results: Results,
    say: Callable[[str], None],
    runs: Runs,
) -> None:
    """Every workload: warm all systems, then take turns; the first of a round moves on by one."""
    for workload in settings.workloads:
        warm = sample_of(workload, max(settings.warm, workload.concurrency), 8)
        for turn in range(settings.rounds + 1):
            first = turn % len(systems)
            for system in [*systems[first:], *systems[:first]]:
                if system.name in results.left_out:
                    continue
                try:
                    run = system.run(warm if turn == 0 else workload)
                except PeerError as error:
                    results.left_out[system.name] = str(error)
                    say(f"left out: {error}")
                    continue
                finally:
                    if isinstance(system, Peer):
                        system.freeze()
                if turn == 0:
                    continue
                check_lengths(run, [ask.new_tokens for ask in workload.asks])
                runs.setdefault((system.name, workload.name), []).append(run)
                speed = workload.output_tokens / (run.ended - run.began)
                say(f"{workload.name}, round {turn}: {system.name} {speed:,.1f} tokens/s")
