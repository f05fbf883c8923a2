"""Where a run's log goes beside ``log.jsonl``: TensorBoard, W&B, or any other known reporter."""

from __future__ import annotations

import importlib.util

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mor.errors import MorError, install_hint

# What to install for those that are not called like their module, and the modules' names.
_PACKAGES: dict[str, tuple[str, str | None]] = {
    "azure_ml": ("azureml", "azureml-core"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
    "tensorboard": ("tensorboard", None),  # an extra of ours
}


def known_reporters() -> list[str]:
    """The names for ``train.report_to``: Accelerate's trackers and Transformers' callbacks."""
    return sorted(LOGGER_TYPE_TO_CLASS.keys() | INTEGRATION_TO_CALLBACK.keys())


def choose_reporters(asked: list[str] | None) -> list[str]:
    """The reporters of a run.

    Args:
        asked: names; None for TensorBoard where it is installed.

    Raises:
        MorError: a reporter's package is not installed.
    """
    if asked is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    for name in asked:
        module, package = _PACKAGES.get(name, (name, name))
        reporter = LOGGER_TYPE_TO_CLASS.get(name) or INTEGRATION_TO_CALLBACK[name]
        theirs = reporter.__module__.startswith(("accelerate.", "transformers."))
        if theirs and importlib.util.find_spec(module) is None:  # a plug-in may need no package
            how = install_hint(name) if package is None else f"pip install {package}"
            raise MorError(
                f"train.report_to names {name}, which is not installed: {how}; "
                "or set train.report_to=[]"
            )
    return list(asked)
