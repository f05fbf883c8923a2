"""Uptraining: what is learnt from the teacher, what stays as it is, how it goes on."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from mor import MoRConfig, MoRForCausalLM
from mor.errors import MorError
from mor.hf.fold import Folding, fold_folder
from mor.hf.llama import plain_depth
from mor.hf.load import load_model
from mor.train import MoRTrainer, load_recipe, parse_recipe, train
from mor.train.groups import members
from mor.train.recipe_file import builtin_recipes
from mor.train.uptrain import settled
from mor.train.uptrainer import UpTrainer
from tests.tiny import SEQ_LEN

WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A vanilla model of six layers, with the data's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "source"
    torch.manual_seed(0)
    config = MoRConfig(vocab_size=300, initializer_range=0.3, **WIDE, **plain_depth(6))
    MoRForCausalLM(config).save_pretrained(folder)
    for path in (data / "tokenizer").iterdir():
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def folded(source: Path) -> Path:
    """Folded to 1 + 2 x 2 + 1, with a little LoRA."""
    out = source.parent / "folded"
    return fold_folder(source, out, Folding(2, relaxation="lora", rank=2))


def fields(data: Path, output: Path, source: Path, folded: Path, **uptrain: Any) -> dict[str, Any]:
    distill = {"teacher": str(source)} | uptrain.pop("distill", {})
    return {
        "name": "up",
        "model": uptrain.pop("model", {}),
        "data": {"path": str(data), "seq_len": SEQ_LEN},
        "uptrain": {"start": str(folded), "distill": distill} | uptrain,
        "train": {
            "budget": {"steps": 6},
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_sequences": 2,
            "report_to": [],
        },
        "output": str(output),
    }


@pytest.fixture
def run(data: Path, tmp_path: Path, source: Path, folded: Path) -> Any:
    """Train with changes of ``uptrain``, ``model`` and, as ``train``, of training."""

    def go(resume: bool = False, **changes: Any) -> Path:
        training = changes.pop("train", {})
        name = changes.pop("name", "up")
        raw = fields(data, tmp_path, source, changes.pop("start", folded), **changes)
        raw["train"] |= training
        return train(parse_recipe(raw | {"name": name}), resume=resume)

    return go


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


# The loss ----------------------------------------------------------------------------------------


def layers_of(model: MoRForCausalLM) -> list[Any]:
    """The unrolled layers."""
    inner = model.model
    return [*inner.prelude_layers, *inner.block, *inner.block, *inner.coda_layers]


def stream(model: MoRForCausalLM, ids: torch.Tensor, layers: list[Any]) -> list[torch.Tensor]:
    """After every layer in order, layer by layer and without a hook."""
    inner, config = model.model, model.config
    hidden = inner.embed(ids)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    rope = inner.rope(positions, hidden.dtype)
    from mor.model.kv import CausalAttend

    found = []
    for number, layer in enumerate(layers):
        inside = number - config.num_prelude_layers
        block = config.num_recursion_layers
        shared = config.num_recursions > 1 and 0 <= inside < config.num_recursions * block
        use = inside // block if shared else 0
        hidden = layer(hidden, rope, CausalAttend(), 0, use)
        found.append(hidden)
    return found


def test_the_loss_is_what_it_says(
    run: Any, source: Path, folded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first micro-batch's loss and gradient against a few plain lines."""
    seen: dict[str, Any] = {}
    before = UpTrainer.compute_loss

    def spy(self: UpTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if seen:
            return before(self, model, inputs, *args, **kwargs)
        seen["ids"] = inputs["input_ids"].clone()
        seen["model"] = copy.deepcopy(model)
        items = kwargs["num_items_in_batch"]
        loss = before(self, model, dict(inputs), *args, **kwargs)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        moving = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(loss, moving, allow_unused=True)
        seen["slopes"] = dict(zip(names, slopes, strict=True))
        seen["loss"], seen["items"] = loss.detach(), items
        return before(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(UpTrainer, "compute_loss", spy)
    weights_ = {"lm": 0.3, "logits": 0.7, "hidden": 2.0, "temperature": 2.0, "top_k": 7}
    run(distill=weights_, train={"budget": {"steps": 1}})
    model, teacher, ids = seen["model"], load_model(source), seen["ids"]
    ours = stream(model, ids, layers_of(model))
    stack = [*teacher.model.prelude_layers, *teacher.model.block, *teacher.model.coda_layers]
    theirs = stream(teacher, ids, stack)
    errors = []
    for one, other in zip(ours, theirs, strict=True):
        scale = other.square().mean(-1, keepdim=True).sqrt()
        errors.append(F.smooth_l1_loss(one / scale, other / scale, beta=0.1))
    z, t = model.model.head(ours[-1])[:, :-1], teacher.model.head(theirs[-1])[:, :-1]
    p, q = (t / 2).softmax(-1), (z / 2).softmax(-1)
    chosen = p.topk(7, -1).indices
    p, q = p.gather(-1, chosen), q.gather(-1, chosen)
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    kl = 4 * (p * (p.log() - q.log())).sum()
    ce = F.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    own = ids.numel() - len(ids)
    expected = (0.3 * ce + 0.7 * kl + 2.0 * own * sum(errors) / len(errors)) / seen["items"]
    assert_close(seen["loss"], expected.detach(), rtol=1e-4, atol=1e-5)
    expected.backward()
    for name, parameter in model.named_parameters():
        assert_close(seen["slopes"][name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_log_has_the_parts(run: Any) -> None:
    for entry in steps_of(run(distill={"lm": 0.5, "logits": 2.0, "hidden": 3.0})):
        total = 0.5 * entry["lm_loss"] + 2 * entry["kd/logits"] + 3 * entry["kd/hidden"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
        assert entry["cpu_s"] > 0


def test_a_student_equal_to_its_teacher_has_no_error(run: Any, source: Path) -> None:
    entry = steps_of(run(start=source, train={"budget": {"steps": 1}}))[0]
    assert entry["kd/logits"] == pytest.approx(0, abs=1e-5)
    assert entry["kd/hidden"] == pytest.approx(0, abs=1e-6)


def test_only_streams(run: Any) -> None:
    entry = steps_of(run(distill={"logits": 0.0}, train={"budget": {"steps": 2}}))[-1]
    assert entry["loss"] == pytest.approx(entry["kd/hidden"], rel=1e-4)
    assert "kd/logits" not in entry
    assert entry["lm_loss"] > 0


def test_without_a_teacher_it_is_plain_training(data: Path, tmp_path: Path, folded: Path) -> None:
    raw = fields(data, tmp_path, tmp_path, folded)
    raw["uptrain"]["distill"] = None
    entry = steps_of(train(parse_recipe(raw)))[0]
    assert entry["loss"] == pytest.approx(entry["lm_loss"])
    assert not [name for name in entry if name.startswith("kd/")]


@pytest.mark.parametrize("where", ["layers", "depths"])
def test_routed_students_compare_what_ran(run: Any, where: str) -> None:
    model = {"router": "threshold", "router_capacities": [1.0, 0.5]}
    model["router_capacity_warmup_steps"] = 2
    entries = steps_of(run(distill={"hidden_at": where}, model=model))
    depths = [entry["router/mean_depth"] for entry in entries]
    assert depths[0] > depths[-1] == pytest.approx(1.5, abs=0.1)
    assert all(entry["kd/hidden"] > 0 for entry in entries)


# The cache ---------------------------------------------------------------------------------------


def cached(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"top_k": 9, "cache": str(tmp_path / "cache")} | more


def test_a_cached_teacher_is_the_live_one(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = steps_of(run(distill={"top_k": 9}, name="live"))
    kept = steps_of(run(distill=cached(tmp_path), name="kept"))
    for one, other in zip(live, kept, strict=True):
        for name in ("loss", "kd/logits", "kd/hidden", "lm_loss"):
            assert one[name] == pytest.approx(other[name], rel=5e-3), name  # float16

    def never(*args: Any) -> Any:
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr("mor.train.teacher.Teacher.ask", never)
    again = steps_of(run(distill=cached(tmp_path), name="again"))
    assert [e["loss"] for e in again] == [e["loss"] for e in kept]


def test_a_cache_grows_with_the_run(run: Any, tmp_path: Path) -> None:
    run(distill=cached(tmp_path), name="short", train={"budget": {"steps": 1}})
    manifest = tmp_path / "cache" / "manifest.json"
    first = json.loads(manifest.read_text())["count"]
    assert first == 4
    run(distill=cached(tmp_path), name="longer", train={"budget": {"steps": 3}})
    assert json.loads(manifest.read_text())["count"] > first


def test_a_wrong_cache_is_refused(run: Any, tmp_path: Path, source: Path) -> None:
    run(distill=cached(tmp_path), name="first", train={"budget": {"steps": 1}})
    with pytest.raises(MorError, match=r"distill.cache=.*was made with top_k=9, this run has 8"):
        run(distill=cached(tmp_path, top_k=8), name="second")
    with pytest.raises(MorError, match=r"made with temperature=1\.0, this run has 2\.0"):
        run(distill=cached(tmp_path, temperature=2.0), name="second")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    model = load_model(other)
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(other)
    with pytest.raises(MorError, match="was made with teacher="):
        run(distill=cached(tmp_path, teacher=str(other)), name="second")
    (tmp_path / "cache" / "logs.bin").write_bytes(b"")
    with pytest.raises(MorError, match=r"logs.bin is missing or cut short"):
        run(distill=cached(tmp_path), name="second")


# Groups ------------------------------------------------------------------------------------------


def test_frozen_weights_stay(run: Any, folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.Optimizer] = []
    before = UpTrainer.create_optimizer

    def spy(self: UpTrainer, model: Any = None) -> Any:
        made.append(before(self, model))
        return made[-1]

    monkeypatch.setattr(UpTrainer, "create_optimizer", spy)
    frozen = ["embeddings", "norms", r"re:block\.1\."]
    folder = run(freeze=frozen)
    old = load_file(folded / "model.safetensors")
    model = load_model(folder)
    still = {name for group in frozen for name in members(model, group, "x")}
    assert still < set(dict(model.named_parameters()))
    for name, tensor in weights(folder).items():
        assert tensor.equal(old[name]) == (name in still), name
    held = sum(p.numel() for group in made[0].param_groups for p in group["params"])
    assert held == sum(p.numel() for n, p in model.named_parameters() if n not in still)
    assert len(made[0].state) == sum(len(group["params"]) for group in made[0].param_groups)


def test_groups_have_their_rates(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: dict[str, float] = {}
    before = MoRTrainer.training_step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = {id(p): n for n, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                rates[names[id(p)]] = group["initial_lr"]
        return before(self, *args, **kwargs)

    monkeypatch.setattr(MoRTrainer, "training_step", spy)
    asked = {"routers": 10.0, "relaxation": 5.0, "embeddings": 0.1, "block": 2.0}
    model = {"router": "threshold"}
    run(rates=asked, model=model, train={"budget": {"steps": 1}})
    for name, rate in rates.items():
        factor = 1.0
        if "router." in name:
            factor = 10
        elif "low_rank" in name:  # in the block too: the first one counts
            factor = 5
        elif "embed_tokens" in name:
            factor = 0.1
        elif "block." in name:
            factor = 2
        assert rate == pytest.approx(1e-2 * factor), name
    assert {round(rate, 6) for rate in rates.values()} == {0.1, 0.05, 0.001, 0.02, 0.01}


# Going on ----------------------------------------------------------------------------------------


def as_if_killed(folder: Path, step: int) -> None:
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("kept", [False, True], ids=["live", "cached"])
def test_resuming_gives_the_same_bits(run: Any, tmp_path: Path, kept: bool) -> None:
    how: dict[str, Any] = {
        "model": {"router": "threshold", "router_capacity_warmup_steps": 4},
        "rates": {"routers": 10.0},
        "freeze": ["embeddings"],
        "distill": cached(tmp_path) if kept else {},
        "train": {"save_steps": 3, "save_total_limit": 9},
    }
    folder = run(**copy.deepcopy(how))
    expected, entries = weights(folder), steps_of(folder)
    as_if_killed(folder, 3)
    run(resume=True, **copy.deepcopy(how))
    again = weights(folder)
    assert all(again[name].equal(expected[name]) for name in expected)
    assert [e["loss"] for e in steps_of(folder)] == [e["loss"] for e in entries]
    seconds = [entry["cpu_s"] for entry in steps_of(folder)]
    assert seconds == sorted(seconds)


def test_another_teacher_is_no_resuming(run: Any, tmp_path: Path, source: Path) -> None:
    folder = run(train={"save_steps": 3, "save_total_limit": 9})
    as_if_killed(folder, 3)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    model = load_model(other)
    torch.nn.init.normal_(model.model.norm.weight)
    shutil.copytree(source, tmp_path / "spare")
    model.save_pretrained(source)
    try:
        with pytest.raises(MorError, match="learnt from another teacher"):
            run(resume=True, train={"save_steps": 3, "save_total_limit": 9})
    finally:
        shutil.rmtree(source)
        shutil.copytree(tmp_path / "spare", source)


def test_two_stages(run: Any) -> None:
    """Recursive first, then a router; weights are still shared, and the layer map goes along."""
    first = run(name="recursive")
    assert json.loads((first / "model" / "fold.json").read_text())["stack"] == list(range(6))
    model = {"router": "threshold", "router_capacity_warmup_steps": 3}
    second = run(name="mor", start=first, model=model)
    one, two = load_model(first), load_model(second)
    assert (one.config.router, two.config.router) == ("fixed", "threshold")
    assert two.config.update_rule == "residual"
    assert len(two.model.block) == 2
    assert two.model.lm_head.weight is two.model.embed_tokens.weight
    entries = steps_of(second)
    assert entries[0]["router/mean_depth"] == pytest.approx(2.0)
    assert entries[-1]["router/mean_depth"] == pytest.approx(1.5, abs=0.1)
    started = {n: t for n, t in weights(second).items() if "router" not in n}
    assert set(started) == set(weights(first))


def test_the_second_stage_begins_where_the_first_ended(run: Any, data: Path) -> None:
    from mor.data import PackedDataset

    first = run(name="recursive")
    frozen = ["re:^model\\.(?!router)"]
    second = run(
        name="mor",
        start=first,
        model={"router": "threshold"},
        freeze=frozen,
        train={"budget": {"steps": 1}, "learning_rate": 1e-9},
    )
    ids = PackedDataset(data, "train", SEQ_LEN)[0]["input_ids"][None]
    one, two = load_model(first), load_model(second)
    two.model.router.boundary.fill_(-1e4)
    with torch.no_grad():
        assert_close(two(ids).logits, one(ids).logits, rtol=1e-3, atol=1e-3)


# What is refused ---------------------------------------------------------------------------------


def other_model(folder: Path, **changes: Any) -> Path:
    config = MoRConfig(**({"vocab_size": 300} | WIDE | plain_depth(6) | changes))
    MoRForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze": ["embedings"]}, r"uptrain.freeze='embedings' is no group.*did you mean 'embed"),
        ({"freeze": ["routers"]}, r"uptrain.freeze='routers' matches no parameter"),
        ({"freeze": ["re:("]}, r"uptrain.freeze='re:\(' is no pattern"),
        ({"freeze": ["re:."]}, r"leaves nothing to train"),
        ({"rates": {"routers": 2.0}}, r"uptrain.rates='routers' matches no parameter"),
        ({"rates": {"norms": 2.0}, "freeze": ["norms"]}, r"uptrain.rates='norms' is frozen"),
        ({"model": {"hidden_size": 32}}, r"model.hidden_size=32 differs .* which has 16"),
        ({"model": {"router": "random"}}, r"model.router='random' weighs tokens by chance"),
        ({"distill": {"top_k": 300}}, r"top_k=300 must be below the vocabulary's 300"),
        ({"train": {"parallel": "fsdp"}}, r"fsdp"),
        ({"train": {"branches": [{"steps": 2}]}}, r"branch_from do not go with uptrain"),
    ],
)
def test_refusals(run: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MorError, match=words):
        run(**changes)


def test_teachers_that_do_not_fit(run: Any, tmp_path: Path, folded: Path) -> None:
    words = other_model(tmp_path / "words", vocab_size=310)
    with pytest.raises(MorError, match=r"vocab_size=310, the student 300"):
        run(distill={"teacher": str(words)})
    wide = other_model(tmp_path / "wide", hidden_size=32)
    with pytest.raises(MorError, match=r"hidden_size=32, the student 16; set .*hidden=0"):
        run(distill={"teacher": str(wide)})
    with pytest.raises(MorError, match="is recursive; name the vanilla model"):
        run(distill={"teacher": str(folded)})
    with pytest.raises(MorError, match="does not exist"):
        run(distill={"teacher": str(tmp_path / "nowhere")})


def test_a_map_that_is_missing_or_wrong(run: Any, tmp_path: Path, folded: Path) -> None:
    deep = other_model(tmp_path / "deep", **plain_depth(8))
    copied = tmp_path / "copied"
    shutil.copytree(folded, copied)
    (copied / "fold.json").unlink()
    with pytest.raises(MorError, match=r"needs to know which of the teacher's 8 layers"):
        run(start=copied, distill={"teacher": str(deep)})
    (copied / "fold.json").write_text('{"stack": [0, 1, 2]}')
    with pytest.raises(MorError, match=r"lists 3 layers .* belongs to another model"):
        run(start=copied)
    (copied / "fold.json").write_text("{")
    with pytest.raises(MorError, match=r"fold.json is damaged"):
        run(start=copied)


@pytest.mark.parametrize(
    ("uptrain", "words"),
    [
        ({"distill": {"logits": 0.0, "hidden": 0.0}}, "distil nothing"),
        ({"distill": {"cache": "x"}}, "cache needs top_k"),
        ({"distill": {"temprature": 2.0}}, "did you mean 'temperature'"),
        ({"freezes": []}, "did you mean 'freeze'"),
        ({"rates": {"routers": 0.0}}, "must be above 0"),
    ],
)
def test_sections_are_checked(uptrain: dict[str, Any], words: str) -> None:
    with pytest.raises(MorError, match=words):
        parse_recipe(fields(Path("d"), Path("o"), Path("s"), Path("f"), **uptrain))


def test_a_model_with_a_router_keeps_it(run: Any) -> None:
    first = run(model={"router": "threshold"}, train={"budget": {"steps": 1}})
    with pytest.raises(MorError, match="has a router already, 'threshold'"):
        run(start=first, name="second", model={"router": "token_choice"})


def test_the_recipe_of_a_run_reads_the_same(run: Any) -> None:
    folder = run(model={"router": "threshold"}, train={"budget": {"steps": 1}})
    known = load_recipe(folder / "recipe.yaml")
    assert settled(known).model == known.model


def test_recipes_that_come_along() -> None:
    names = [name for name in builtin_recipes() if name.startswith("uptrain/")]
    assert len(names) >= 2
    for name in names:
        assert load_recipe(name).uptrain is not None
