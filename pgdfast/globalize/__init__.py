"""From a step of the model to a step that is kept: damping rules, second-order corrections, line search, bit-exact undo."""

from .acceleration import ACCELERATIONS, Chord, Geodesic, acceleration
from .damping import LARGEST, RULES, Constant, Delayed, GainRatio, Sweep, damping_rule
from .draws import Generators
from .judge import judged
from .line_search import Armijo, line_search
from .members import MembersMove
from .model import curvature, predictions
from .momentum import Momentum, checked_constraint
from .move import Move
from .on_device import judged_on_device, on_device
from .sweep import best
from .trial import Trials, run_trial, trial_loss

__all__ = [
    "ACCELERATIONS", "LARGEST", "RULES", "Armijo", "Chord", "Constant", "Delayed", "GainRatio", "Generators", "Geodesic",
    "MembersMove", "Momentum", "Move", "Sweep", "Trials", "acceleration", "best", "checked_constraint", "curvature",
    "damping_rule", "judged", "judged_on_device", "line_search", "on_device", "predictions", "run_trial", "trial_loss",
]
