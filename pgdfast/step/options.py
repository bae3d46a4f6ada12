"""What an optimizer was asked for, and what serves all of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..solve import CG
from .balance import Balance
from .convergence import Tolerances
from .correction import Acceleration
from .evaluate import Evaluator
from .line_search import LineSearch
from .parameters import Parameters
from .rng_replay import MovedGenerators
from .rules import DampingRule


@dataclass(slots=True)
class StepOptions:
    """What LM was asked for."""

    rule: DampingRule
    search: LineSearch | None
    acceleration: Acceleration | None
    momentum: float
    constraint: float | None
    scaling: str
    solver: str
    cg: CG
    rcond: float
    tolerances: Tolerances = field(default_factory=Tolerances)
    balance: Balance | None = None
    predicts: bool = field(init=False)   # are steps tried before they are kept?
    asks: bool = field(init=False)       # for tests of convergence wider than rounding?

    def __post_init__(self):
        self.predicts, self.asks = self.rule.tries or self.search is not None, self.tolerances.asked


@dataclass(slots=True)
class StepTools:
    """What serves all steps of one optimizer."""

    backend: object
    evaluator: Evaluator = field(default_factory=Evaluator)
    replays: MovedGenerators = field(default_factory=MovedGenerators)
    parameters: Parameters | None = None
