"""Uptraining: a run that starts from a model and may learn from the one it was folded from.

    mor fold SOURCE --num-recursions 2 --out models/folded
    mor uptrain recursive.yaml mor.yaml

A run is one stage. Where a second one adds a router to what the first one made recursive, its
``uptrain.start`` is the first one's run folder, and its ``model`` names the router.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mor.config import MoRConfig, field_types
from mor.data import DataIndex
from mor.data.bos import Bos, check_same_bos, model_bos
from mor.data.media import MediaIndex
from mor.errors import MorError
from mor.folder.config import load_config
from mor.folder.tokenizer import tokenizer_beside
from mor.hf.bos import tokenizer_of
from mor.hf.fold.fold import open_router
from mor.hf.fold.plan import open_router_fields
from mor.hf.load import load_as, load_model
from mor.hf.register import class_for
from mor.run_files import model_folder
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import RecipeError
from mor.train.recipe.uptrain import UptrainSection
from mor.train.state import checkpoints
from mor.train.uptrain.gain import check_gain, prepare_router
from mor.train.uptrain.groups import freeze
from mor.train.uptrain.layer_states import numbers_at
from mor.train.uptrain.teacher import Teacher, weights_digest

FOLD = "fold.json"
_ROUTER_STD = 1e-5
_ALSO_FREE = ("update_rule", "kv_sharing", "add_bos_token")
# Parts that a model may get here, and what one without them has: they start without effect.
_NEW_PARTS = {"recursion_scalars": False, "recursion_streams": 1}


def resolve_model(recipe: Recipe) -> Recipe:
    """The recipe with ``model`` written out: the start's configuration, the router on top.

    Done twice it changes nothing, so that the recipe in a run folder reads the same.

    Raises:
        MorError: the start is no model, or ``model`` would change more than its router.
    """
    section = recipe.uptrain
    if section is None:
        return recipe
    if recipe.train.branches or recipe.train.branch_from is not None:
        raise RecipeError(
            "train.branches and train.branch_from do not go with uptrain; start another run from "
            "this one's folder (uptrain.start)"
        )
    start = load_config(section.start)
    fields = {name: getattr(start, name) for name in field_types()}
    fields = {name: value for name, value in fields.items() if value is not None}
    given = {name: value for name, value in recipe.model.items() if value is not None}
    for name, value in given.items():
        free = name.startswith("router") or name in _ALSO_FREE
        new = name in _NEW_PARTS and getattr(start, name) == _NEW_PARTS[name]
        if not (free or new) and value != fields.get(name):
            raise RecipeError(
                f"model.{name}={value!r} differs from the model in {section.start}, which has "
                f"{fields.get(name)!r}; only the router's fields may be set in uptraining"
                f" (and {', '.join([*_ALSO_FREE, *_NEW_PARTS])}, the last two where it has none)"
            )
    router = given.get("router", start.router)
    if router != start.router:
        if start.router != "fixed":
            raise RecipeError(
                f"model.router={router!r}: the model in {section.start} has a router already, "
                f"{start.router!r}; start from a recursive model, whose router is fixed"
            )
        if router == "random":
            raise RecipeError(
                "model.router='random' weighs tokens by chance, so that training cannot begin as "
                "the model was; use threshold, expert_choice or token_choice"
            )
        fields = {n: v for n, v in fields.items() if not n.startswith("router")}
        fields |= open_router_fields(given.get("router_capacity_warmup_steps", 0))
    return recipe.model_copy(update={"model": fields | given})


def check_tokenizer(section: UptrainSection, index: DataIndex) -> None:
    """Refuse data of another tokenizer than the start's, where the start has one.

    Raises:
        MorError: naming both.
    """
    if index.tokenizer_dir.is_dir():
        tokenizer_beside(model_folder(section.start), index)


def check_bos(recipe: Recipe, index: DataIndex) -> None:
    """Refuse data whose documents begin otherwise than the start reads its texts.

    Where ``model.add_bos_token`` says it, the recipe's model is held to the data instead: so one
    that reads its texts with BOS is trained, knowingly, to do without.

    Raises:
        MorError: naming both.
    """
    assert recipe.uptrain is not None
    if recipe.model.get("add_bos_token") is None:
        folder = model_folder(recipe.uptrain.start)
        bos = model_bos(MoRConfig.from_pretrained(folder), tokenizer_of(folder))
        check_same_bos(bos, index.bos, f"the model in {folder}", index.directory)


def start_model(section: UptrainSection, config: MoRConfig, seed: int = 0) -> Any:
    """The model that training starts from, under ``config``; a router that is new starts open.

    Raises:
        MorError: the folder cannot be read, or a group to freeze does not exist.
    """
    source = load_as(class_for(load_config(section.start)), section.start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = class_for(config)(config)
        if config.router != source.config.router:
            open_router(model.model.router, _ROUTER_STD)
    result = model.load_state_dict(source.state_dict(), strict=False)
    new = [n for n in result.missing_keys if not n.startswith(("model.router.", "model.seam."))]
    if new or result.unexpected_keys:
        name = (new or result.unexpected_keys)[0]
        raise MorError(f"{section.start} does not fit the recipe's model: {name}")
    if config.modality == "text" and isinstance(source.generation_config, GenerationConfig):
        model.generation_config = source.generation_config
        if source.generation_config.bos_token_id == source.config.bos_token_id:
            model.generation_config.bos_token_id = config.bos_token_id
    if section.gain is not None:
        prepare_router(model, section.gain)
    freeze(model, [*section.freeze, *(["trunk"] if section.gain is not None else [])])
    return model


def source_stack(section: UptrainSection, config: MoRConfig, source_layers: int) -> list[int]:
    """The teacher's layer at the place of each unrolled layer of the student.

    Raises:
        MorError: no ``fold.json`` says it and the depths differ, or it names other layers.
    """
    path = model_folder(section.start) / FOLD
    depth = config.num_hidden_layers
    if not path.is_file():
        if depth == source_layers:
            return list(range(depth))
        raise MorError(
            f"uptrain.distill.hidden needs to know which of the teacher's {source_layers} layers "
            f"stands at each of the {depth}: {path} is missing (mor fold writes it); put it there "
            "or set uptrain.distill.hidden=0"
        )
    try:
        stack = [int(layer) for layer in json.loads(path.read_text(encoding="utf-8"))["stack"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise MorError(f"{path} is damaged: it holds no list 'stack'") from None
    if len(stack) != depth or not all(0 <= layer < source_layers for layer in stack):
        raise MorError(
            f"{path} lists {len(stack)} layers up to {max(stack, default=-1)}; the model has "
            f"{depth} and the teacher {source_layers}: it belongs to another model or teacher"
        )
    return stack


def open_teacher(section: UptrainSection, config: MoRConfig) -> Teacher | None:
    """The teacher, on the CPU; None where nothing is distilled.

    Raises:
        MorError: it cannot be read, is no vanilla model, or does not fit the student.
    """
    distill = section.distill
    if distill is None:
        return None
    model = load_model(distill.teacher.expanduser())
    theirs = model.config
    if theirs.num_recursions != 1:
        raise MorError(
            f"uptrain.distill.teacher={str(distill.teacher)!r} is recursive; name the vanilla "
            "model that the start was folded from"
        )
    if theirs.vocab_size != config.vocab_size:
        raise MorError(
            f"uptrain.distill.teacher has vocab_size={theirs.vocab_size}, the student "
            f"{config.vocab_size}; their probabilities cannot be compared: both must read one "
            "tokenizer's tokens"
        )
    if config.add_bos_token is not None:
        place = model_folder(distill.teacher)
        whose = f"the teacher in {place}"
        ours = Bos(config.bos_token_id, config.add_bos_token)
        check_same_bos(model_bos(theirs, tokenizer_of(place)), ours, whose, "the student's text")
    if distill.top_k is not None and distill.top_k >= theirs.vocab_size:
        raise MorError(
            f"uptrain.distill.top_k={distill.top_k} must be below the vocabulary's "
            f"{theirs.vocab_size}; leave it out to take all"
        )
    layers: dict[int, int] = {}
    if distill.hidden:
        if theirs.hidden_size != config.hidden_size:
            raise MorError(
                f"uptrain.distill.teacher has hidden_size={theirs.hidden_size}, the student "
                f"{config.hidden_size}; set uptrain.distill.hidden=0"
            )
        stack = source_stack(section, config, theirs.num_hidden_layers)
        layers = {number: stack[number] for number in numbers_at(config, distill.hidden_at)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Teacher(model, layers, distill.logits > 0, distill.temperature, distill.top_k)


def check_media(recipe: Recipe, index: MediaIndex) -> None:
    """Refuse what uptraining on images and sounds does not know, and other classes.

    Raises:
        MorError: naming the field or the classes.
    """
    section = recipe.uptrain
    assert section is not None
    if section.distill is not None:
        raise MorError(
            "uptrain.distill compares probabilities of tokens; for images and sounds leave it out"
        )
    start = load_config(section.start)
    ours = start.class_names
    if start.head_type == "classes" and ours != list(index.classes):
        raise MorError(
            f"the model in {section.start} answers with {', '.join(ours)}, but "
            f"{index.directory} has the classes {', '.join(index.classes)}"
        )
    if section.gain is not None and start.head_type != "classes":
        raise MorError(
            f"uptrain.gain measures the loss of classes; the model in {section.start} has "
            f"head_type={start.head_type!r}"
        )


def check_uptrain(recipe: Recipe, index: DataIndex | MediaIndex) -> dict[str, Any]:
    """What can be refused before a run folder is taken; what its checkpoints keep beside others.

    Raises:
        MorError: data of another tokenizer, or a way of training that uptraining does not know.
    """
    section = recipe.uptrain
    assert section is not None
    if recipe.train.parallel == "fsdp":
        raise MorError("train.parallel='fsdp' does not go with uptrain yet; use ddp")
    if isinstance(index, MediaIndex):
        check_media(recipe, index)
    else:
        if index.tokenizer_dir.is_dir():
            check_tokenizer(section, index)
        check_bos(recipe, index)
    if section.gain is not None:
        check_gain(recipe, section.gain)
    if section.distill is None:
        return {}
    if section.distill.cache is not None and recipe.data.packing != "concat":
        raise MorError(
            f"uptrain.distill.cache needs data.packing='concat', not {recipe.data.packing!r}: it "
            "keeps sequences without padding; leave the cache out"
        )
    if section.distill.cache is not None and recipe.data.document_mask:
        raise MorError(
            "uptrain.distill.cache keeps what the teacher says about whole sequences; with "
            "data.document_mask leave it out"
        )
    return {"teacher": weights_digest(section.distill.teacher.expanduser())}


def check_origin(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Refuse to go on from ``checkpoint`` with another teacher.

    Raises:
        MorError: its weights are not those that began the run.
    """
    before = checkpoints.manifest(checkpoint).get("teacher", facts.get("teacher"))
    if before != facts.get("teacher"):
        raise MorError(
            f"{checkpoint} learnt from another teacher than uptrain.distill.teacher is now; its "
            "weights must be the same"
        )


def keep_map(section: UptrainSection, out: Path) -> None:
    """Copy the start's layer map into ``out``, for the stage after this one."""
    path = model_folder(section.start) / FOLD
    if path.is_file():
        shutil.copyfile(path, out / FOLD)
