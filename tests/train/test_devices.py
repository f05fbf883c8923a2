"""What a recipe says about several devices, and what it may not say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mor.cli import main
from mor.errors import MorError
from mor.train import Recipe, RecipeError, train
from mor.train.distributed import check_ranks, eval_batch_size, leaves_unused
from tests.strategies import small_config
from tests.tiny import tiny_fields, tiny_recipe


def test_one_process_has_nothing_to_shard(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(data, tmp_path, parallel="fsdp")
    with pytest.raises(MorError, match=r"train.parallel='fsdp'.*torchrun --nproc-per-node N"):
        train(recipe)
    assert not recipe.run_dir.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fsdp_regather": True}, "fsdp_regather=True belongs to parallel='fsdp'"),
        ({"parallel": "zero"}, "train.parallel='zero'"),
        ({"global_batch_size": 8}, "global_batch_size=8 or gradient_accumulation_steps=2"),
        ({"global_batch_size": 0, "gradient_accumulation_steps": 1}, "global_batch_size=0"),
    ],
)
def test_recipes_that_contradict_themselves(
    fields: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(data, tmp_path, **fields)


def recipe_of(data: Path, output: Path, **fields: Any) -> Recipe:
    return tiny_recipe(data, output, **{"gradient_accumulation_steps": 1} | fields)


def test_the_global_batch_decides_accumulation(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(data, tmp_path, global_batch_size=24, batch_size=2)
    assert [recipe.train.accumulation(n) for n in (1, 2, 3, 4, 12)] == [12, 6, 4, 3, 1]
    assert {recipe.sequences_per_step(n) for n in (1, 2, 3, 4, 12)} == {24}
    for ranks in (5, 24):
        with pytest.raises(RecipeError, match=f"global_batch_size=24 is no multiple.* x {ranks} p"):
            recipe.train.accumulation(ranks)


def test_a_global_batch_is_one_run_however_it_is_cut(data: Path, tmp_path: Path) -> None:
    """Stopped with micro-batches of four, resumed with micro-batches of two."""
    fields = {
        "global_batch_size": 4,
        "save_steps": 4,
        "budget": {"steps": 8},
        "save_total_limit": 9,
    }
    recipe = recipe_of(data, tmp_path, batch_size=4, **fields)
    folder = train(recipe)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-8")
    train(recipe_of(data, tmp_path, batch_size=2, **fields), resume=True)
    assert (folder / "summary.json").is_file()
    (folder / "summary.json").unlink()
    changed = recipe_of(data, tmp_path, batch_size=2, **fields | {"global_batch_size": 8})
    with pytest.raises(MorError, match=r"train\.global_batch_size=8 was 4"):
        train(changed, resume=True)


def test_another_number_of_ranks_needs_a_global_batch(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(data, tmp_path)
    for rank in range(3):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    with pytest.raises(MorError, match=r"by 3 process\(es\), 6 sequences a step; 1 with .* it 2"):
        check_ranks(recipe, tmp_path)
    check_ranks(recipe_of(data, tmp_path, global_batch_size=6), tmp_path)


def test_evaluation_batches_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for sequences in range(1, 40):
        size = eval_batch_size(sequences, 8)
        assert 1 <= size <= 8
        assert size == 1 or sequences % (4 * size) == 0
    assert eval_batch_size(64, 8) == 8
    assert eval_batch_size(48, 8) == 6
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert eval_batch_size(7, 8) == 8


def test_what_gets_no_gradient_is_announced() -> None:
    assert not leaves_unused(small_config("expert_choice"))
    assert leaves_unused(small_config("threshold", update_rule="additive"))
    assert leaves_unused(small_config("fixed", router_fixed_depth=1))


def test_defaults_are_written_out(data: Path, tmp_path: Path) -> None:
    dumped = tiny_recipe(data, tmp_path).model_dump()["train"]
    assert (dumped["parallel"], dumped["fsdp_regather"]) == ("ddp", False)
    assert "parallel" not in tiny_fields(data, tmp_path)["train"]


# mor merge ---------------------------------------------------------------------------------------


def mor(*words: object) -> int:
    """The exit status of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mor", *map(str, words)])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def test_merge_says_what_is_wrong(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(recipe_of(data, tmp_path, save_steps=4))
    out = tmp_path / "out"
    assert mor("merge", tmp_path / "nothing", "--out", out) == 2
    assert "does not exist" in capsys.readouterr().err
    assert mor("merge", folder, "--out", data) == 2
    assert "exists already" in capsys.readouterr().err
    (folder / "recipe.yaml").unlink()
    assert mor("merge", folder, "--out", out) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert mor("merge", data, "--out", out, "--tokenizer", folder / "model") == 2
    assert "is no checkpoint: config.json is missing" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert mor("merge", folder, "--out", out, "--tokenizer", folder / "model") == 0
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
