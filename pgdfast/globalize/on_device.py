"""Damping rules and the verdict on a step as operations on 0-dim float64 tensors, which never ask the host.

The same formulas as damping.py and judge.py; tests hold them against each other. mu is positive here, so that no rule needs
the model's curvature.
"""

from __future__ import annotations

import math

import torch

from .damping import LARGEST, Constant, Delayed, GainRatio


class _Constant:
    def __init__(self, rule: Constant):
        pass

    def accepted(self, mu, nu, rho):
        """Unchanged."""
        return mu, nu

    def rejected(self, mu, nu):
        """Ten times mu, for another factorisation."""
        return (10 * mu).clamp_max(LARGEST), nu

    def exhausted(self, start, nu):
        """The mu that was given."""
        return start, nu


class _GainRatio:
    def __init__(self, rule: GainRatio):
        self.smallest = rule.smallest

    def accepted(self, mu, nu, rho):
        """Mu * max(1/3, 1 - (2 rho - 1)^3), nu = 2; rho is NaN where there is none."""
        factor = (1 - (2 * rho.clamp(0.0, 1.0) - 1) ** 3).clamp_min(1 / 3)
        moved = (mu * factor).clamp(self.smallest, LARGEST)
        return torch.where(torch.isnan(rho), mu, moved), torch.full_like(nu, 2.0)

    def rejected(self, mu, nu):
        """Up by nu, which doubles."""
        return (mu * nu).clamp_max(LARGEST), (2 * nu).clamp_max(LARGEST)

    def exhausted(self, start, nu):
        """Ten times the mu that the attempts began with, nu = 2."""
        return (10 * start).clamp_max(LARGEST), torch.full_like(nu, 2.0)


class _Delayed:
    def __init__(self, rule: Delayed):
        self.smallest = rule.smallest

    def accepted(self, mu, nu, rho):
        """Down by 5."""
        return (mu / 5).clamp_min(self.smallest), nu

    def rejected(self, mu, nu):
        """Up by 2."""
        return (2 * mu).clamp_max(LARGEST), nu

    def exhausted(self, start, nu):
        """Ten times the mu that the attempts began with."""
        return (10 * start).clamp_max(LARGEST), nu


_ON_DEVICE = {Constant: _Constant, GainRatio: _GainRatio, Delayed: _Delayed}


def on_device(rule):
    """The rule on tensors, by the same verbs with nu, GainRatio's growth factor, beside mu; None for other rules."""
    found = _ON_DEVICE.get(type(rule))
    return found and found(rule)


def judged_on_device(loss, after, predicted, first, dtype: torch.dtype):
    """(kept, gain ratio, stalled) of a trial, as `judged` has them; a ratio of NaN is none. dtype: of the loss."""
    stalled = first & (predicted.abs() <= 8 * torch.finfo(dtype).eps * loss.abs())
    kept = (after < loss) | (stalled & (after == loss))
    ratio = torch.where((predicted > 0) & torch.isfinite(after), (loss - after) / predicted, -math.inf)
    return kept, torch.where(stalled, math.nan, ratio), stalled
