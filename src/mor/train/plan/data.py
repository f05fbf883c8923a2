"""What a plan knows of the data: what its folders say or, before that, what is assumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mor.config import MoRConfig
from mor.data import DataIndex
from mor.errors import MorError
from mor.train.data import describe_passes, find_config
from mor.train.recipe.recipe import Recipe

# Of `mor data prepare`, for a recipe that names neither a vocabulary nor a preset.
VOCABULARY = 4096


@dataclass(frozen=True)
class PlannedData:
    """The data of a recipe.

    Attributes:
        config: of the model, with the vocabulary of the data.
        missing: folders that are not there.
        tokens: training tokens that they will have together, where that was given.
        note: what is assumed; empty where all is there.
    """

    config: MoRConfig
    missing: tuple[Path, ...] = ()
    tokens: int | None = None
    note: str = ""

    def passes(self, recipe: Recipe, trained: int) -> str:
        """How often ``trained`` tokens go through the data, for people to read."""
        if not self.missing:
            return describe_passes(recipe.data, trained)
        if self.tokens is not None:
            return f"{trained / self.tokens:.2f}, of {self.tokens:,} tokens as given"
        return f"1.00 assumed, of {trained:,} tokens (--data-tokens N says how many there will be)"


def plan_data(recipe: Recipe, data_tokens: int | None = None) -> PlannedData:
    """Look at the data of ``recipe``; a folder that is not there is planned without.

    Args:
        recipe: validated.
        data_tokens: training tokens that the data will have.

    Raises:
        MorError: a folder is there and damaged, tokenizers differ, the model does not fit, or
            ``data_tokens`` is given for data that is there.
    """
    folders = [folder for folder, _ in recipe.data.folders]
    missing = tuple(folder for folder in folders if not folder.expanduser().exists())
    if not missing:
        if data_tokens is not None:
            raise MorError(
                f"data_tokens={data_tokens}: {folders[0]} is there and its tokens are counted; "
                "leave --data-tokens out"
            )
        return PlannedData(find_config(recipe))
    named = ", ".join(map(str, missing))
    if recipe.data.kind != "text":
        raise MorError(
            f"{named}: not there; how many tokens an example has, and how many classes there are, "
            "the data says: prepare it first (mor data prepare)"
        )
    there = [folder for folder in folders if folder not in missing]
    if there:
        index = DataIndex.load(there[0])
        config = recipe.model_config_for(index.vocab_size, index.eos_token_id, index.known_bos())
        note = f"{named}: not there; vocabulary {config.vocab_size:,}, as in {there[0]}"
        return PlannedData(config, missing, data_tokens, note)
    own, preset = recipe.model.get("vocab_size"), recipe.model.get("preset")
    # A preset has the vocabulary of the paper's tokenizer.
    size = own or (49152 if preset else VOCABULARY)
    whose = "the recipe's" if own else f"assumed, that of preset {preset}" if preset else "assumed"
    config = recipe.model_config_for(size, 0)
    note = f"{named}: not there; vocabulary {size:,}, {whose}"
    return PlannedData(config, missing, data_tokens, note)
