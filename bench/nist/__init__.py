"""NIST's Statistical Reference Datasets for nonlinear regression: 27 curve fits, each with certified parameters.

Source: National Institute of Standards and Technology, https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml, public domain.
data.json has the numbers of NIST's files: two starts, the certified parameters and residual sum of squares, the observations.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .models import MODELS

DATA = Path(__file__).parent / "data.json"
CERTIFIED = 11.0   # digits that NIST gives


@dataclass(frozen=True)
class Problem:
    """level: of difficulty, NIST's. starts: two lists of parameters. rss: certified sum of squares. y, x: observations."""

    name: str
    level: str
    starts: tuple
    certified: tuple
    rss: float
    y: torch.Tensor
    x: tuple

    def residuals(self, b: torch.Tensor) -> torch.Tensor:
        """The model at parameters b, (P,), minus the observations, (M,)."""
        return MODELS[self.name](b, *self.x) - self.y

    def digits(self, b) -> float:
        """Correct digits of the worst parameter: NIST's log relative error, from 0 to 11."""
        worst = max(abs(float(found) - true) / abs(true) for found, true in zip(b, self.certified, strict=True))
        if not worst < 1:   # NaN, too
            return 0.0
        return CERTIFIED if worst == 0 else min(CERTIFIED, -math.log10(worst))


def _read() -> dict[str, Problem]:
    problems = {}
    for name, given in json.loads(DATA.read_text(encoding="utf-8")).items():
        columns = {key: torch.tensor(given[key], dtype=torch.float64) for key in ("y", "x", "x1", "x2") if key in given}
        y = columns.pop("y")
        problems[name] = Problem(
            name, given["level"], tuple(map(tuple, given["starts"])), tuple(given["certified"]), given["rss"],
            y.log() if name == "Nelson" else y, tuple(columns.values()),
        )
    return problems


PROBLEMS = _read()
