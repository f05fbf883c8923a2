"""lm-eval's command line, where `--model mor` and our tasks are known whatever its version."""

from __future__ import annotations

import sys

from mor.eval.harness.run import TASKS, need_harness


def main() -> None:
    """Run lm-eval with `sys.argv`."""
    need_harness()
    from lm_eval.__main__ import cli_evaluate

    import mor.eval.harness.lm  # noqa: F401  (its import makes the model known)

    if "--tasks" in sys.argv and "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()
