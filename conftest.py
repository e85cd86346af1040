"""Keeps the repository root out of the import path of every test and of the processes that tests start.

The root folders `kernels` and `data` would otherwise be importable under their bare names, and the first of them is
also the name of a package that transformers imports.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
os.environ["PYTHONSAFEPATH"] = "1"
