"""Benchmarks: commands that are run from the root of a checkout as `python -m benchmarks...`.

`speed` times layers and models, `quality` trains and compares them, `pages` turns the rows that
both leave in `results/` into tables and plots of the documentation.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""
# the steps of the recipes are scripts, which import each other by their plain names
sys.path.append(str(ROOT / "recipes/steps"))
RESULTS = ROOT / "benchmarks/results"
"""The rows of all benchmarks, as csv files."""
