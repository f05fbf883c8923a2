"""The ``uptrain`` section of a recipe: what training starts from, and what it learns from."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from mor.train.recipe.fields import decides
from mor.train.recipe.sections import Folder, Section


class DistillSection(Section):
    """What is learnt from the teacher, and how the terms are weighed."""

    teacher: Folder = decides("weights and speed", description="folder of the source model")
    lm: float = decides(
        "weights and speed", 0.0, ge=0, description="weight of the next-token cross-entropy"
    )
    logits: float = decides(
        "weights and speed", 1.0, ge=0, description="weight of KL(teacher || student)"
    )
    hidden: float = decides(
        "weights and speed", 1.0, ge=0, description="weight of the error of the stream, by layer"
    )
    hidden_at: Literal["layers", "depths"] = decides(
        "weights and speed",
        "layers",
        description="compare after every unrolled layer, or after every depth",
    )
    temperature: float = decides("weights and speed", 1.0, gt=0, description="of both softmaxes")
    top_k: int | None = decides(
        "weights and speed",
        None,
        ge=1,
        description="of the teacher's probabilities; the rest counts as one outcome",
    )
    cache: Folder | None = decides(
        "weights and speed",
        None,
        description="run the teacher once and keep what it said here; None runs it live",
    )

    @model_validator(mode="after")
    def _something(self) -> DistillSection:
        if not (self.logits or self.hidden):
            raise ValueError("logits=0.0 and hidden=0.0 distil nothing; leave distill out")
        if self.cache is not None and self.logits and self.top_k is None:
            raise ValueError(
                "cache needs top_k, such as 64: all probabilities of a token take as much room as "
                "the vocabulary is large"
            )
        return self


class GainSection(Section):
    """Training the router alone, from what deeper passes bring on a frozen trunk."""

    margin: float = decides(
        "weights", 0.05, ge=0, description="nats that going deeper must save to be worth it"
    )
    sharpness: float = decides(
        "weights", 50.0, gt=0, description="of the target sigmoid(sharpness (gain - margin))"
    )
    elsewhere: Literal["shallow", "ignore"] = decides(
        "weights",
        "shallow",
        description="tokens without a label: taught to leave at once, or not taught",
    )
    context: Literal["full", "routed"] = decides(
        "weights and speed",
        "full",
        description="depth of tokens without a label while gains are measured: all passes, as the "
        "trunk was trained, or where the router sends them, once the trunk was trained so",
    )
    confidence: float = decides(
        "weights", 0.3, gt=0, lt=1, description="a token goes deeper where the router is surer"
    )


class UptrainSection(Section):
    """Training that goes on from a model; the recipe's ``model`` may change its router alone."""

    start: Folder = decides(
        "nothing", description="model or run folder to start from, as mor fold writes"
    )
    distill: DistillSection | None = decides(
        "weights and speed", None, description="None: next-token loss alone"
    )
    gain: GainSection | None = decides(
        "weights and speed",
        None,
        description="train the router alone, from what each further pass brings; the rest freezes",
    )
    rates: dict[str, float] = decides(
        "weights",
        {},
        description="learning rate by group of parameters, in multiples of the main one",
    )
    freeze: list[str] = decides(
        "weights and speed", [], description="groups of parameters that stay as they are"
    )

    @model_validator(mode="after")
    def _one_objective(self) -> UptrainSection:
        if self.gain is not None and self.distill is not None:
            raise ValueError("gain and distill exclude each other: one trains the router alone")
        return self

    @model_validator(mode="after")
    def _positive(self) -> UptrainSection:
        for name, factor in self.rates.items():
            if factor <= 0:
                raise ValueError(
                    f"rates: {name}={factor} must be above 0; to keep a group as it is, freeze it"
                )
        return self
