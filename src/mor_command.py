"""What the command ``mor`` starts with.

``import mor`` loads torch and Transformers, so that Transformers knows our model from then on. A
command such as ``mor --help`` needs neither. Where this module was imported first, ``import mor``
loads nothing, and each command imports what it needs when it runs.
"""

from __future__ import annotations


def main() -> None:
    """Run ``mor``; see :func:`mor.cli.main`."""
    try:
        from mor.cli import main as run
    except KeyboardInterrupt:  # so early that nothing has begun
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    # Under its own name, by which ``import mor`` looks for it.
    from mor_command import main as start

    start()
