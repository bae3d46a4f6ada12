"""What is compared: every fixed combination of rule and acceleration that LM accepts, the default until now, and no options."""

import torch

import pgdfast
from pgdfast.step.choice import RULES
from pgdfast.step.correction import ACCELERATIONS

DEFAULT, TODAY = "default", "today"
_NOT_FIXED = ("constant", "auto")   # not adaptive; chooses among the others


def _accepted(options) -> bool:
    try:
        pgdfast.LM([torch.zeros(1, requires_grad=True)], **options)
    except ValueError:
        return False
    return True


def _fixed() -> dict[str, dict]:
    found = {}
    for rule in RULES:
        for acceleration in (None, *(name for name in ACCELERATIONS if name not in _NOT_FIXED)):
            options = {"damping_rule": rule, "acceleration": acceleration}
            if rule not in _NOT_FIXED and _accepted(options):
                found[f"{rule} + {acceleration}" if acceleration else rule] = options
    return found


FIXED = _fixed()
VARIANTS = {
    **FIXED,
    TODAY: {"damping": 1e-2, "damping_rule": "gain-ratio", "acceleration": None, "scaling": "identity"},
    DEFAULT: {},
}


def applies(variant, problem) -> bool:
    """Can the variant train on the problem? Acceleration needs sums of squares."""
    return problem.corrects or VARIANTS[variant].get("acceleration") is None
