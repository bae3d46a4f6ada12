"""Rules and verdict on tensors against those on numbers."""

import math
import types

import pytest
import torch

from pgdfast.globalize import Constant, Delayed, GainRatio, Sweep, judged, judged_on_device, on_device

MUS = (1e-20, 3e-20, 1e-9, 0.01, 1.0, 1e5, 6e19, 1e20)


def numbers(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


@pytest.mark.parametrize("make", [GainRatio, Delayed, lambda: GainRatio(1e-3), lambda: Delayed(1e-3)])
@pytest.mark.parametrize("mu", MUS)
def test_rules_agree(make, mu):
    twin = on_device(make())
    for rho in (-math.inf, -2.0, 0.0, 0.1, 0.5, 0.77, 1.0, 3.0, None):
        for nu in (2.0, 8.0, 1e20):
            for verb, given in (("accepted", (rho,)), ("rejected", (-1.0, 1.0)), ("exhausted", ())):
                rule = make()
                if hasattr(rule, "nu"):
                    rule.nu = nu
                expected = getattr(rule, verb)(mu, *given)
                extra = numbers(math.nan if rho is None else rho) if verb == "accepted" else []
                found, grown = getattr(twin, verb)(*numbers(mu, nu), *extra)
                assert float(found) == pytest.approx(expected, rel=1e-15)
                assert float(grown) == getattr(rule, "nu", nu)


def test_the_constant_rule_raises_mu_for_another_factor_alone():
    twin, (mu, nu, rho) = on_device(Constant()), numbers(0.3, 2.0, math.nan)
    assert float(twin.accepted(mu, nu, rho)[0]) == float(twin.exhausted(mu, nu)[0]) == 0.3
    assert float(twin.rejected(mu, nu)[0]) == Constant().invalid(0.3, 1.0)


def test_other_rules_have_none():
    class Mine(GainRatio):
        pass

    assert on_device(Sweep()) is None and on_device(Mine()) is None


@pytest.mark.parametrize("loss", [1.0, 1e-30])
@pytest.mark.parametrize("after", [0.5, 1.0, 1 - 1e-16, 1 + 1e-9, 2.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("predicted", [0.4, 1e-16, 0.0, -1e-17, -0.3])
@pytest.mark.parametrize("first", [True, False])
def test_verdicts_agree(loss, after, predicted, first):
    after, predicted = after * loss, predicted * loss
    for dtype in (torch.float32, torch.float64):
        report = types.SimpleNamespace(loss=loss)
        expected = judged(report, after, predicted, True, first, dtype)
        kept, ratio, stalled = judged_on_device(*numbers(loss, after, predicted), torch.tensor(first), dtype)
        assert bool(kept) == expected and bool(stalled) == (report.status == "stalled")
        assert math.isnan(float(ratio)) if report.gain_ratio is None else float(ratio) == report.gain_ratio
