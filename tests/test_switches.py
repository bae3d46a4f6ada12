"""Switches of a hybrid: what they measure, when they ask for the other optimizer, and what they refuse."""

import functools
import math

import pytest
import torch
from helpers import fit, rand, snapshot, unchanged
from hybrids import SWITCHES, hybrid, outputs, steps, switch_step

import pgdfast
from pgdfast import reference, spectra
from pgdfast.report import Report


def test_a_switch_of_ones_own_is_asked_before_the_first_step_and_after_each():
    params, closure = fit()
    asked = []

    class Third:
        def over(self, step, lm):
            asked.append((step, lm.report.loss if step else None))
            return "third" if step == 3 else ""

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    optimizer = hybrid(params, Third())
    losses = steps(optimizer, closure, 5)
    assert asked == [(0, None), (1, losses[0]), (2, losses[1]), (3, losses[2])]
    assert (optimizer.switched_at, optimizer.why) == (3, "third")


def test_a_switch_that_raises_leaves_the_lm_step_standing():
    params, closure = fit()
    calls = []

    def probe():
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("probe")
        return outputs(params)

    optimizer = hybrid(params, pgdfast.KernelDrift(probe, every=1))
    before = snapshot(params)
    with pytest.raises(MemoryError, match="probe"):
        optimizer.step(closure)
    assert optimizer.steps == 1 and not unchanged(params, before)
    optimizer.step(closure)
    assert optimizer.steps == 2 and optimizer.switch.drift > 0


def test_kernel_drift_is_measured_against_explicit_jacobians():
    params, closure = fit()
    probe = functools.partial(outputs, params)
    K0 = reference.linearize(probe, params).gram()
    switch = pgdfast.KernelDrift(probe, threshold=1e9, every=3)
    optimizer = hybrid(params, switch)
    optimizer.step(closure)
    assert switch.drift == 0.0
    steps(optimizer, closure, 3)   # 4 taken; measured after 3
    drift = switch.drift
    optimizer.lm.step(closure)
    assert switch.over(6, optimizer.lm) == ""
    K = reference.linearize(probe, params).gram()
    assert switch.drift == pytest.approx(float((K - K0).norm() / K0.norm()), rel=1e-9)
    assert 0 < drift != switch.drift


def test_kernel_drift_switches_at_the_first_measurement_past_its_threshold():
    params, closure = fit()
    drifts = []
    watcher = pgdfast.KernelDrift(functools.partial(outputs, params), threshold=1e9, every=1)
    optimizer = hybrid(params, watcher)
    for _ in range(12):
        optimizer.step(closure)
        drifts.append(watcher.drift)
    threshold = sorted(drifts)[len(drifts) // 2]
    expected = next(k for k in range(2, 13, 2) if drifts[k - 1] >= threshold)

    params, closure = fit()
    optimizer = hybrid(params, pgdfast.KernelDrift(functools.partial(outputs, params), threshold, every=2))
    steps(optimizer, closure, 12)
    assert optimizer.switched_at == expected
    assert optimizer.why.startswith(f"the kernel has drifted by {drifts[expected - 1]:.3g} of its norm")


def test_a_linear_model_never_drifts():
    w, x = rand(5).requires_grad_(), rand(8, 5, seed=3)
    optimizer = pgdfast.Hybrid(
        pgdfast.LM([w], damping=1.0), torch.optim.SGD([w], lr=0.1), pgdfast.KernelDrift(lambda: x @ w, 1e-12, every=1)
    )
    steps(optimizer, lambda: x @ w - 1, 6)
    assert optimizer.switched_at is None and optimizer.switch.drift == 0.0


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_measuring_on_other_backends(backend, monkeypatch):
    expected = switch_step("drift")
    monkeypatch.setenv("PGDFAST_BACKEND", backend)
    params, closure = fit()
    optimizer = hybrid(params, SWITCHES["drift"](params), scaling="marquardt")
    steps(optimizer, closure, 12)
    assert optimizer.switched_at == expected


def test_the_kernel_in_float32():
    params, closure = fit(torch.float32)
    x = rand(12, 2, seed=1, dtype=torch.float32)
    probe = lambda: torch.tanh(x @ params[0].T + params[1]) @ params[2].T  # noqa: E731
    K0 = reference.linearize(probe, params).gram()
    switch = pgdfast.KernelDrift(probe, threshold=1e9, every=1)
    steps(hybrid(params, switch), closure, 2)
    K = reference.linearize(probe, params).gram()
    assert switch.drift == pytest.approx(float((K - K0).norm() / K0.norm()), rel=1e-4)


def test_a_probe_too_large_for_the_memory_is_refused_before_the_first_step(monkeypatch):
    params, closure = fit()
    monkeypatch.setattr(spectra, "available_memory", lambda device: 1000.0)
    optimizer = hybrid(params, pgdfast.KernelDrift(functools.partial(outputs, params)))
    before = snapshot(params)
    with pytest.raises(MemoryError, match="KernelDrift: 3 matrices of M x M for M = 12 residuals take .* fewer residuals"):
        optimizer.step(closure)
    assert unchanged(params, before) and optimizer.steps == 0


def test_free_memory_is_a_plausible_number():
    free = spectra.available_memory(torch.device("cpu"))
    assert 1e6 < free < 1e14 or free == math.inf


class Aligned:
    """Probes with K = diag(k), whose alignment with the first coordinate is k_0 / ||k||."""

    def __init__(self, values):
        self.w, self.values = rand(2).requires_grad_(), values
        self.lm = pgdfast.LM([self.w])

    def ask(self, switch):
        """The number of measurements after which it switched, or None."""
        for k, value in enumerate(self.values):
            self.value = value
            if switch.over(k, self.lm):
                return k + 1
        return None

    def probe(self):
        a = self.value   # alignment a: k_0 = a, k_1 = sqrt(1 - a^2)
        return self.w * torch.tensor([a, math.sqrt(1 - a * a)], dtype=torch.float64).sqrt()


@pytest.mark.parametrize(
    ("values", "over"),
    [
        ([0.3] * 9, None),                                # lazy: flat from the start
        ([0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6], 6),         # stops at 0.6; two measurements without growth
        ([0.3, 0.4, 0.39, 0.5, 0.49, 0.48, 0.4], 6),      # a dip is no stop
        ([0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6], None),   # still growing
    ],
)
def test_alignment_must_rise_and_stop(values, over):
    probes = Aligned(values)
    switch = pgdfast.Alignment(probes.probe, torch.tensor([1.0, 0.0]), every=1, patience=2)
    assert probes.ask(switch) == over
    assert switch.history == pytest.approx(values[:over], rel=1e-12)


def test_the_target_of_alignment_is_the_first_residual():
    params, closure = fit()
    targets = rand(12, 1, seed=5)
    probe = lambda: outputs(params) - targets  # noqa: E731
    first = reference.linearize(probe, params)
    r0 = first.residual
    switch = pgdfast.Alignment(probe, every=2)
    optimizer = hybrid(params, switch)
    steps(optimizer, closure, 2)
    last = reference.linearize(probe, params)
    for lin, value in zip((first, last), switch.history, strict=True):
        K = lin.gram()
        assert value == pytest.approx(float(r0 @ K @ r0 / (K.norm() * (r0 @ r0))), rel=1e-9)


class Reported:
    """An LM as a switch sees it."""

    predicts = True

    def __init__(self, loss=1.0, reduction=0.0, status="accepted"):
        self.report = Report(loss, predicted_reduction=reduction, status=status)


def asked(switch, reports):
    return next((k for k, lm in enumerate(reports, start=1) if switch.over(k, lm)), None)


@pytest.mark.parametrize(
    ("rate", "noise", "over"),
    [(0.8, 0.0, None), (0.98, 0.0, 20), (1.0, 0.0, 20), (0.8, 0.3, None)],
)
def test_plateau_of_the_loss(rate, noise, over):
    losses = [rate**k * (1 + noise * (-1) ** k) for k in range(60)]
    assert asked(pgdfast.Plateau(10, 0.5), [Reported(loss) for loss in losses]) == over


def test_plateau_waits_for_a_plateau():
    losses = [0.5**k for k in range(10)] + [0.5**9] * 30
    switched = asked(pgdfast.Plateau(4, 0.9), [Reported(loss) for loss in losses])
    assert 14 <= switched <= 18   # both windows must lie on the plateau, or nearly


def test_plateau_of_the_linearized_model():
    falling = [Reported(0.5**k, 0.4 * 0.5**k) for k in range(30)]
    assert asked(pgdfast.Plateau(4, 0.9, of="model"), falling) is None
    small = [Reported(1.0, 0.01)] * 30
    assert asked(pgdfast.Plateau(4, 0.9, of="model"), small) == 4
    undone = [Reported(1.0, 0.5, "rejected"), Reported(1.0, None, "failed")] * 10   # promised and not had
    assert asked(pgdfast.Plateau(4, 0.9, of="model"), undone) == 4


def test_empty_steps_do_not_count_for_a_plateau():
    assert asked(pgdfast.Plateau(1, 0.9), [Reported(math.nan, status="empty")] * 9 + [Reported()] * 2) == 11


def test_plateau_of_the_model_under_a_constant_damping_is_refused_before_the_first_step():
    params, closure = fit()
    optimizer = hybrid(params, pgdfast.Plateau(4, of="model"), damping_rule="constant")
    before = snapshot(params)
    with pytest.raises(ValueError, match="of='model' needs predicted reductions.*use of='loss'"):
        optimizer.step(closure)
    assert unchanged(params, before)


BAD = {
    "KernelDrift: closure": lambda: pgdfast.KernelDrift(3),
    "KernelDrift: threshold is 0": lambda: pgdfast.KernelDrift(fit, 0),
    "KernelDrift: threshold is nan": lambda: pgdfast.KernelDrift(fit, math.nan),
    "KernelDrift: every is 0": lambda: pgdfast.KernelDrift(fit, every=0),
    "Alignment: patience is 1.5": lambda: pgdfast.Alignment(fit, patience=1.5),
    "Alignment: rise is -1": lambda: pgdfast.Alignment(fit, rise=-1),
    "Plateau: window is 0": lambda: pgdfast.Plateau(0),
    "Plateau: factor is 1": lambda: pgdfast.Plateau(5, 1),
    "Plateau: of is 'gradient'": lambda: pgdfast.Plateau(5, of="gradient"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_of_switches(message):
    with pytest.raises((ValueError, TypeError), match="pgdfast." + message):
        BAD[message]()
