"""Where a run's log goes beside ``log.jsonl``: TensorBoard, W&B, or any name the Trainer knows."""

from __future__ import annotations

import importlib.util

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mor.errors import MorError

# What to install for those that are not called like their module, and the modules' names.
_PACKAGES = {
    "azure_ml": ("azureml", "azureml-core"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
    "tensorboard": ("tensorboard", "'mixture-of-recursions[tensorboard]'"),
}


def known_reporters() -> list[str]:
    """The names that ``train.report_to`` may hold: those of Transformers' Trainer."""
    return sorted(INTEGRATION_TO_CALLBACK)


def reporters(asked: list[str] | None) -> list[str]:
    """What the Trainer shall report to.

    Args:
        asked: names; None for TensorBoard where it is installed.

    Raises:
        MorError: a reporter's package is not installed.
    """
    if asked is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    for name in asked:
        module, package = _PACKAGES.get(name, (name, name))
        callback = INTEGRATION_TO_CALLBACK[name]
        ours = callback.__module__.startswith("transformers.")  # a plug-in may need no package
        if ours and importlib.util.find_spec(module) is None:
            raise MorError(
                f"train.report_to names {name}, which is not installed: pip install {package} "
                "or set train.report_to=[]"
            )
    return list(asked)
