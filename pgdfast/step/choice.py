"""Damping rules by name, and the corrections that go with them."""

from __future__ import annotations

from .auto import Auto
from .correction import Acceleration, Chord, chosen_acceleration
from .rules import Constant, DampingRule, Delayed, GainRatio, Longest, Sweep

RULES = {"auto": Auto, "constant": Constant, "gain-ratio": GainRatio, "delayed": Delayed, "longest": Longest, "sweep": Sweep}


def chosen_rule(rule) -> DampingRule:
    """The rule of a name, or the given one.

    Raises ValueError for an unknown name and TypeError for an object that is no DampingRule.
    """
    if isinstance(rule, DampingRule):
        return rule
    if isinstance(rule, str):
        if rule in RULES:
            return RULES[rule]()
        raise ValueError(
            f"pgdfast.LM: damping_rule {rule!r} is not available; use one of {', '.join(RULES)}, or a pgdfast.DampingRule."
        )
    raise TypeError(
        f"pgdfast.LM: damping_rule {rule!r} is no pgdfast.DampingRule; use one of {', '.join(RULES)}, or subclass "
        "pgdfast.DampingRule and define accepted(mu, memory, rho) and rejected(mu, memory, rho, curvature)."
    )


_GOOD = 0.5   # gain ratio from which the automatic rule's steps are not corrected


def chosen_together(rule, acceleration, plain: bool) -> tuple[DampingRule, Acceleration | None]:
    """The rule and the correction by their names, or as they were given.

    acceleration "auto" is the chord where the rule is "auto", and no correction with other rules. plain: is there a reason not
    to correct steps without being asked to (an ensemble, whose members' corrections run one by one; a line search; momentum)?
    A correction that was asked for leaves "auto" nothing to choose: the rule is then "gain-ratio".
    """
    found = chosen_rule(rule)
    if isinstance(acceleration, str) and acceleration == "auto":
        return found, Chord(enough=_GOOD) if found.learns and not plain else None
    given = chosen_acceleration(acceleration)
    return (GainRatio() if rule == "auto" and given is not None else found), given
