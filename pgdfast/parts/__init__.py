"""A problem whose rows come in parts, of batches or of processes: J = [J_1; ...; J_R]."""

from .batches import Batched, on_all_rows
from .entry import linearize
from .group import Alone, Ranks, chosen_group
from .linearization import Parts
from .linearizer import PartsLinearizer
from .whole import refuse_distributed

__all__ = [
    "Alone", "Batched", "Parts", "PartsLinearizer", "Ranks", "chosen_group", "linearize", "on_all_rows", "refuse_distributed",
]
