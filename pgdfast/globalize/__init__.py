"""From a step of the model to a step that is kept: damping rules, line search, and bit-exact undo."""

from .damping import RULES, Constant, Delayed, GainRatio, damping_rule
from .draws import Generators
from .line_search import Armijo, line_search
from .momentum import Momentum, checked_constraint
from .move import Move
from .trial import trial_loss

__all__ = [
    "RULES", "Armijo", "Constant", "Delayed", "GainRatio", "Generators", "Momentum", "Move", "checked_constraint",
    "damping_rule", "line_search", "trial_loss",
]
