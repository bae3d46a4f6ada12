"""Closures as users write them, each with an oracle of its own: `python -m bench closures`.

The files whose names begin with `cases_` register their closures by kind; importing this folder gathers all of them.
"""

import importlib
from pathlib import Path

from .corpus import CASES, Case, Maker, Problem, case

for _path in sorted(Path(__file__).parent.glob("cases_*.py")):
    importlib.import_module(f"{__name__}.{_path.stem}")

__all__ = ["CASES", "Case", "Maker", "Problem", "case"]
