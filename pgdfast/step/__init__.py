"""One step: damping rules, attempts and their verdict, corrections, line search, bit-exact undo."""

from ..kernels.errors import out_of_memory
from .attempt import ATTEMPTS, STATUS, State, Trial, Verdict, advance, demanded, judge
from .auto import Auto
from .balance import Balance, Weighted, check_balance, chosen_balance
from .choice import RULES, chosen_together
from .convergence import Tolerances
from .correction import Acceleration, Chord, Geodesic
from .evaluate import Evaluator
from .host import HostStep
from .line_search import Armijo, LineSearch, chosen_search
from .members import checked, each_of, joined, new_memory, share_of
from .momentum import checked_constraint, checked_momentum
from .options import StepOptions, StepTools
from .parameters import Parameters, Point
from .quadratic_model import gradient_curvature
from .rng_replay import MovedGenerators, RandomReplay
from .rules import Constant, DampingRule, Delayed, GainRatio, Longest, Sweep, first_damping

__all__ = [
    "ATTEMPTS", "RULES", "STATUS", "Acceleration", "Armijo", "Auto", "Balance", "Chord", "Constant", "DampingRule",
    "Delayed", "Evaluator", "GainRatio", "Geodesic", "HostStep", "LineSearch", "Longest", "MovedGenerators", "Parameters",
    "Point", "RandomReplay", "State", "StepOptions", "StepTools", "Sweep", "Tolerances", "Trial", "Verdict", "Weighted",
    "advance", "check_balance", "checked", "checked_constraint", "checked_momentum", "chosen_balance", "chosen_search",
    "chosen_together", "demanded", "each_of", "first_damping", "gradient_curvature", "joined", "judge",
    "new_memory", "out_of_memory", "share_of",
]
