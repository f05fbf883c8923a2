"""The folder as a command: a Python that has no ``mor`` finds the rest of it beside this file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

folder = Path(__file__).resolve().parent
found = sys.path[:]
sys.path[:] = [str(folder.parent)]
sys.path += found[1:]
main = importlib.import_module(f"{folder.name}.orders").main
sys.path[:] = found[1:]  # or the files beside the folder would stand in for others' modules
main()
