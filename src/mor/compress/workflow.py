"""The steps of ``mor compress``, each kept as it ends: the same command goes on where it stopped.

source -> data -> a gap for each shape -> a short trial of each -> the better one, uptrained with
the source as teacher -> a router, if asked for -> scores of source and result -> model and report.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mor.compress.inputs import find_data, find_source
from mor.compress.plan import Shape, find_shapes, fold_shape, places
from mor.compress.report import report_text
from mor.compress.settings import PILOT_SHARE, Settings, State
from mor.compress.stages import stage_recipe
from mor.data import PackedDataset
from mor.data.progress import Progress, no_progress
from mor.disk import replace_folder, write_whole
from mor.errors import MorError
from mor.eval import calibrate
from mor.eval.folds import fold_table
from mor.eval.passes import run_pass
from mor.folder.config import load_config
from mor.hf.fold.fold import fold_folder
from mor.hf.load import load_model
from mor.hf.modeling import MoRForCausalLM
from mor.model.flops import count_parameters, flops_per_token
from mor.provenance import provenance
from mor.run_files import MODEL, SUMMARY
from mor.train import train

ROUTE_SHARE = 0.25
"""Of the tokens, more: for the stage in which a router learns."""


class Compression:
    """One compression: :meth:`run` does what is left of it.

    Args:
        settings: what is asked for.
        tell: called with a line about each thing that is found.
        progress: of the preparation of data.
    """

    def __init__(
        self,
        settings: Settings,
        tell: Callable[[str], None] = lambda line: None,
        progress: Progress = no_progress,
    ) -> None:
        settings.check()
        self.settings, self.tell, self.progress = settings, tell, progress
        self.out = settings.out

    def run(self) -> Path:
        """Do every step that is not done; returns the folder of the model.

        Raises:
            MorError: naming what does not fit; what is done stays.
            Interrupted: asked to stop; the same call goes on.
        """
        state = State.open(self.settings)
        source = Path(state.step("source", lambda: find_source(self.settings, self.tell)))
        data = Path(
            state.step("data", lambda: find_data(self.settings, source, self.tell, self.progress))
        )
        self._model, self._dataset = self._open(source, data)
        config = self._model.config
        shapes = find_shapes(config, self.settings.goal, self._dataset.seq_len)
        estimate = state.step("estimate", lambda: self._estimate(shapes))
        trials = [
            state.step(shape.name, partial(self._try_shape, shape, source, data))
            for shape in shapes
        ]
        chosen = state.step("chosen", lambda: self._choose(trials))
        run = state.step("trained", lambda: self._train(chosen["folder"], source, data))
        if self.settings.route:
            run = state.step("routed", lambda: self._route(run, source, data))
        nll = estimate["source_nll"]
        result = state.step(
            "scores", lambda: self._score(source, nll, Path(chosen["folder"]), Path(run))
        )
        return self._publish(Path(run), result, trials, chosen)

    # Steps ------------------------------------------------------------------------------------

    def _open(self, source: Path, data: Path) -> tuple[MoRForCausalLM, PackedDataset]:
        model = _load(source)
        if model.config.num_recursions != 1:
            raise MorError(
                f"source {source} is recursive already (num_recursions="
                f"{model.config.num_recursions}); mor compress begins from a plain model"
            )
        if self.settings.route and self.settings.goal.ratio is None:
            self.tell("note: --route makes the result faster still than --speed asks for")
        longest = int(model.config.max_position_embeddings)
        length = min(self.settings.seq_len, longest)
        return model, PackedDataset(data, "validation", length)

    @property
    def _sequences(self) -> int:
        wanted = max(1, self.settings.sample_tokens // self._dataset.seq_len)
        return min(wanted, len(self._dataset))

    def _nll(self, model: MoRForCausalLM) -> float:
        """Nats per token of the held-out sample under the causal rule."""
        size = self.settings.batch_size
        return run_pass(model.eval(), self._dataset, self._sequences, size, "causal").nll

    def _estimate(self, shapes: list[Shape]) -> dict[str, Any]:
        """Time one scoring of the source; everything else is so many times that."""
        started = time.perf_counter()
        nll = self._nll(self._model)
        seconds = time.perf_counter() - started
        per_token = seconds / (self._sequences * self._dataset.seq_len)
        places_tried = sum(len(places(self._model.config, shape)) for shape in shapes)
        tokens = self.settings.tokens * (1 + PILOT_SHARE * len(shapes))
        tokens += self.settings.tokens * ROUTE_SHARE * self.settings.route
        # The teacher once, the student forward and twice that backward.
        total = seconds * places_tried + 4 * per_token * tokens
        self.tell(f"source: NLL {nll:.4f} on {self._sequences} held-out sequences")
        self.tell(f"estimate: at most {_spell(total)} on this machine, {places_tried} places tried")
        return {"source_nll": nll, "seconds": total}

    def _try_shape(self, shape: Shape, source: Path, data: Path) -> dict[str, Any]:
        """Find the gap of ``shape``, fold, train for a short while and score."""
        config = self._model.config
        bare = replace(shape, name="left out", block=0)
        tried = [fold_shape(config, bare, before) for before in places(config, shape)]
        rows = fold_table(
            self._model,
            self._dataset,
            tried,
            max_sequences=self._sequences,
            batch_size=self.settings.batch_size,
            tell=lambda row: self.tell(
                f"{shape.name}: {'the source' if row.folding is None else _gap(row.folding, shape)}"
                f", NLL {row.nll:.4f}"
            ),
        )[1:]
        best = min(range(len(rows)), key=lambda place: rows[place].nll)
        before = places(config, shape)[best]
        folder = self.out / "candidates" / shape.name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        fold_folder(source, folder, fold_shape(config, shape, before))
        run = self._uptrain(f"trial-{folder.name}", folder, source, data, PILOT_SHARE)
        result: dict[str, Any] = (
            asdict(shape)
            | {
                "folder": str(folder),
                "gap": [before, before + shape.leave_out - 1],
                "nll_before_training": rows[best].nll,
                "trial_nll": self._nll(_load(run)),
            }
            | self._size(folder)
        )
        self.tell(f"{shape.name}: after a trial NLL {result['trial_nll']:.4f}")
        return result

    def _choose(self, trials: list[dict[str, Any]]) -> dict[str, Any]:
        """The shape whose trial ended lower; only a recursive one can be routed."""
        able = [trial for trial in trials if trial["block"]] if self.settings.route else trials
        if not able:
            raise MorError("--route needs the recursive shape, and it does not fit; leave it out")
        best = min(able, key=lambda trial: trial["trial_nll"])
        self.tell(f"chosen: {best['name']}, without layers {best['gap'][0]}-{best['gap'][1]}")
        return best

    def _train(self, folder: str, source: Path, data: Path) -> str:
        return str(self._uptrain("uptrained", Path(folder), source, data, 1.0))

    def _route(self, run: str, source: Path, data: Path) -> str:
        """A threshold router that opens at full depth and closes over a third of its steps."""
        steps = self._steps(ROUTE_SHARE)
        model = {"router": "threshold", "router_capacity_warmup_steps": max(1, steps // 3)}
        routed = self._uptrain("routed", Path(run), source, data, ROUTE_SHARE, model)
        network = _load(routed)
        # Not on the texts that the result is scored on.
        sample = PackedDataset(data, "train", self._dataset.seq_len)
        calibrate(network, sample, max_sequences=min(self._sequences, len(sample)))
        with replace_folder(routed / MODEL, overwrite=True) as fresh:
            shutil.copytree(routed / MODEL, fresh, dirs_exist_ok=True)
            network.save_pretrained(fresh)
        return str(routed)

    def _score(self, source: Path, source_nll: float, folded: Path, run: Path) -> dict[str, Any]:
        """The result beside the source, on the same held-out tokens."""
        network = _load(run)
        size = self.settings.batch_size
        ours = run_pass(network, self._dataset, self._sequences, size, "causal")
        score: dict[str, Any] = ours.score(self._dataset.bytes_per_token)
        return {
            "source": self._size(source) | {"nll": source_nll},
            "folded_nll": self._nll(_load(folded)),
            "result": self._size(run, score["active_fraction"]) | score,
            "sequences": self._sequences,
            "seq_len": self._dataset.seq_len,
            "data": self._dataset.index.source,
        }

    def _publish(
        self, run: Path, scores: dict[str, Any], trials: list[Any], chosen: dict[str, Any]
    ) -> Path:
        """The model folder, its card and the report; written anew each time."""
        record = {"scores": scores, "trials": trials, "chosen": chosen["name"]} | provenance()
        text = report_text(self.settings, scores, trials, chosen)
        with replace_folder(self.out / MODEL, overwrite=True) as fresh:
            shutil.copytree(run / MODEL, fresh, dirs_exist_ok=True)
            write_whole(fresh / "README.md", text)
        write_whole(self.out / "report.md", text)
        State.open(self.settings).step("record", lambda: record)
        return self.out / MODEL

    # Parts ------------------------------------------------------------------------------------

    def _steps(self, share: float) -> int:
        per_step = self._dataset.seq_len * self.settings.batch_size
        return max(1, round(share * self.settings.tokens / per_step))

    def _uptrain(
        self,
        name: str,
        start: Path,
        source: Path,
        data: Path,
        share: float,
        model: dict[str, Any] | None = None,
    ) -> Path:
        """A run folder ``runs/name``, begun, gone on with, or as it is where it is finished."""
        recipe = stage_recipe(
            self.settings,
            name,
            start,
            source,
            data,
            self._steps(share),
            self._dataset.seq_len,
            model,
        )
        if not (recipe.run_dir / SUMMARY).is_file():
            train(recipe, resume=recipe.run_dir.exists())
        return recipe.run_dir

    def _size(self, folder: Path, active: list[float] | None = None) -> dict[str, Any]:
        """Weights and FLOPs; ``active`` is the share of tokens that ran each depth."""
        config = load_config(folder)
        flops = flops_per_token(config, self._dataset.seq_len, active)
        return {
            "weights": count_parameters(config)[0],
            "flops": flops.forward,
            "layers_run": config.num_hidden_layers,
        }


def _load(folder: Path) -> MoRForCausalLM:
    """The model of ``folder``, in evaluation mode, on the GPU where there is one."""
    model = load_model(folder)
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]
    return model.eval()


def _gap(folding: Any, shape: Shape) -> str:
    before = folding.num_recursion_layers
    return f"without layers {before}-{before + shape.leave_out - 1}"


def _spell(seconds: float) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    return f"{hours:g} hours" if minutes >= 90 else f"{max(1, minutes)} min"
