"""One run of `mor train` on the workers of a Ray cluster (`pip install 'ray[train]'`).

    python examples/ray_train.py my-recipe.yaml --workers 8 --gpus

Ray Train starts the workers, joins them, and starts all of them again where one dies; each time
the run goes on from its newest whole checkpoint. `output` and `data.path` must lie on storage that
all nodes share. With `train.global_batch_size` in the recipe the number of workers may change in
between.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(settings: dict[str, Any]) -> None:
    """One worker: torch's process group is there already."""
    from mor.train import load_recipe, train

    recipe = load_recipe(settings["recipe"])
    train(recipe, resume=(recipe.run_dir / "checkpoints").is_dir())


def main() -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", action="store_true", help="one for each worker")
    parser.add_argument("--max-failures", type=int, default=3)
    args = parser.parse_args()
    TorchTrainer(
        work,
        train_loop_config={"recipe": str(args.recipe.resolve())},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpus),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=args.max_failures)),
    ).fit()


if __name__ == "__main__":
    main()
