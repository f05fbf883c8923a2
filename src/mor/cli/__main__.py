"""``python -m mor.cli`` is ``mor``."""

from mor.cli.app import main

main()
