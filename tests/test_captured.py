"""Captured steps, run operation by operation on the CPU: the same trajectory as LM.step."""

import copy
import math
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, LOSSES, fit_by, flat, forget_rules, memory_of, rand, relative, sine_fit, snapshot, unchanged

import pgdfast


def pair(**options):
    """Two equal problems, the second with a captured step: plain ones, unless asked otherwise."""
    options = {"damping_rule": "gain-ratio"} | options
    model, lm, closure = sine_fit(**options)
    twin, captured, same = sine_fit(**copy.deepcopy(options))
    return model, lm, closure, twin, captured, pgdfast.CapturedStep(captured, same)


def agree(report, ordinary):
    """Do the fields of two reports agree?"""
    assert (report.status, report.solver, report.residuals, report.parameters) == (
        ordinary.status, ordinary.solver, ordinary.residuals, ordinary.parameters)
    for name in ("loss", "loss_after", "gain_ratio", "predicted_reduction", "damping", "next_damping"):
        ours, theirs = getattr(report, name), getattr(ordinary, name)
        assert ours == theirs or ours == pytest.approx(theirs, rel=1e-6), name


# --- the same steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_constant_rule_takes_the_same_steps(backend):
    model, lm, closure, twin, captured, step = pair(damping_rule="constant", lr=0.3, backend=backend)
    for _ in range(30):
        assert float(step.step()) == pytest.approx(float(lm.step(closure)), rel=1e-12)
        assert relative(flat(twin.parameters()), flat(model.parameters())) < 1e-12
    assert captured.report.loss_after is None and captured.report.gain_ratio is None
    assert captured.report.status == "accepted" and captured.report.damping == 0.01


@pytest.mark.parametrize("options", [
    {}, {"damping_rule": pgdfast.Delayed(smallest=1e-4)}, {"damping_rule": pgdfast.Longest(smallest=1e-4)},
    {"damping_rule": "auto", "acceleration": None}, {"solver": "primal"}, {"damping": 1e-9}, {"lr": 0.7, "weight_decay": 1e-3},
], ids=lambda options: " ".join(options))
def test_attempts_follow_the_same_dampings(options):
    """Rejections in between: as many captured steps as the ordinary one needed attempts."""
    model, lm, closure, twin, captured, step = pair(**options)
    rejections = 0
    for _ in range(30):
        lm.step(closure)
        for attempt in range(lm.report.attempts):
            before = snapshot(twin.parameters())
            loss = step.step()
            assert captured.report.attempts == attempt + 1
            if attempt + 1 < lm.report.attempts:
                rejections += 1
                assert captured.report.status == "rejected" and unchanged(twin.parameters(), before)
                assert captured.report.next_damping > captured.report.damping
                assert captured.report.loss_after == captured.report.loss == float(loss)
        agree(captured.report, lm.report)
        assert relative(flat(twin.parameters()), flat(model.parameters())) < 1e-8   # rounding grows along the way
    assert rejections > 0 or options.get("lr")


def test_steps_without_rejections_agree_to_rounding():
    model, lm, closure, twin, captured, step = pair(damping=100.0, damping_rule=pgdfast.GainRatio(smallest=0.1))
    for _ in range(35):
        lm.step(closure)
        step.step()
        assert lm.report.attempts == 1
        assert relative(flat(twin.parameters()), flat(model.parameters())) < 1e-12


def test_groups_have_their_own_rates_and_decay():
    problems = []
    for _ in range(2):
        model, _, closure = sine_fit()
        first, *others = model.parameters()
        groups = [{"params": [first], "lr": 0.5}, {"params": others, "lr": 0.9}]
        problems.append((model, pgdfast.LM(groups, damping=1.0, damping_rule="gain-ratio"), closure))
    (model, lm, closure), (twin, captured, same) = problems
    step = pgdfast.CapturedStep(captured, same)
    for k in range(12):
        for optimizer in (lm, captured):
            optimizer.param_groups[0]["lr"] = 0.5 / (1 + k)
            optimizer.param_groups[1]["weight_decay"] = 1e-3 if k > 4 else 0.0
        lm.step(closure)
        for _ in range(lm.report.attempts):
            step.step()
        agree(captured.report, lm.report)
    assert relative(flat(twin.parameters()), flat(model.parameters())) < 1e-9


def test_a_schedule_of_the_damping():
    model, lm, closure, twin, captured, step = pair(damping=lambda k: 1.0 / (k + 1), damping_rule="constant")
    for _ in range(8):
        lm.step(closure)
        step.step()
        assert captured.report.damping == pytest.approx(lm.report.damping)
    assert relative(flat(twin.parameters()), flat(model.parameters())) < 1e-12


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_every_form_of_loss(name, solver):
    lm, closure = fit_by(name, solver=solver, damping_rule="gain-ratio")
    captured, same = fit_by(name, solver=solver, damping_rule="gain-ratio")
    step = pgdfast.CapturedStep(captured, same)
    for _ in range(4):
        lm.step(closure)
        for _ in range(lm.report.attempts):
            step.step()
        agree(captured.report, lm.report)
    assert relative(flat(captured.param_groups[0]["params"]), flat(lm.param_groups[0]["params"])) < 1e-9


# --- never uphill, failures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["gain-ratio", "delayed", "longest"])
def test_never_uphill(rule):
    model, lm, closure = sine_fit(damping=1e-7, damping_rule=rule, dtype=torch.float32)
    step, losses, rejected = pgdfast.CapturedStep(lm, closure), [], 0
    for _ in range(60):
        before = snapshot(model.parameters())
        losses.append(float(step.step()))
        rejected += lm.report.status == "rejected"
        if lm.report.status != "accepted" and lm.report.loss_after == lm.report.loss and lm.report.gain_ratio is not None:
            assert unchanged(model.parameters(), before)
    assert rejected and all(b <= a for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < 0.1 * losses[0]


def singular(dtype):
    """Residuals of 300 equal rows, whose matrix has no factor at a tiny mu."""
    model = torch.nn.Linear(3, 1, dtype=dtype)
    with torch.no_grad():
        model.weight.fill_(0.7)
    x = torch.ones(300, 3, dtype=dtype)
    return model, lambda: 1e3 * (model(x) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ["gain-ratio", "constant"])
def test_a_failed_factorization_leaves_the_parameters_and_raises_mu(rule, dtype):
    model, closure = singular(dtype)
    lm = pgdfast.LM(model.parameters(), damping=1e-12, damping_rule=rule, solver="dual")
    step, mus, before = pgdfast.CapturedStep(lm, closure), [], snapshot(model.parameters())
    for _ in range(10):
        step.step()
        mus.append(lm.report.damping)
        if lm.report.status != "failed":
            break
        assert unchanged(model.parameters(), before) and lm.report.next_damping > mus[-1]
        assert lm.report.solve_status == "not_positive_definite" and "raise the damping" in lm.report.advice
    assert lm.report.status == "accepted" and not unchanged(model.parameters(), before)
    factors = [10.0] * 9 if rule == "constant" else [2.0**k for k in range(1, 10)]
    assert len(mus) > 1 and [b / a for a, b in zip(mus, mus[1:], strict=False)] == pytest.approx(factors[: len(mus) - 1])
    if rule == "constant":
        step.step()
        assert lm.report.damping == 1e-12


def test_twelve_rejections_end_as_in_an_ordinary_step():
    """A closure whose loss rises wherever one goes: mu after each attempt, and the stall named after three such rows."""

    def rising(lm_model):
        x = torch.ones(4, 3, dtype=torch.float64)
        at = lm_model.weight.detach().clone()
        return lambda: lm_model(x) - 1 + 1e3 * (lm_model.weight.detach() - at).abs().sum()

    reports, captured = [], []
    for capture in (False, True):
        model = torch.nn.Linear(3, 1, dtype=torch.float64)
        with torch.no_grad():
            model.weight.fill_(0.7)
            model.bias.fill_(0.2)
        lm = pgdfast.LM(model.parameters(), damping_rule="delayed", scaling="identity")
        closure = rising(model)
        step = pgdfast.CapturedStep(lm, closure) if capture else None
        for _ in range(5):
            for _ in range(12 if capture else 1):
                step.step() if capture else lm.step(closure)
            (captured if capture else reports).append(lm.report)
    for ours, theirs in zip(captured, reports, strict=True):
        assert (ours.status, ours.next_damping) == (theirs.status, pytest.approx(theirs.next_damping))
        assert ours.attempts == theirs.attempts == 12 and ours.advice == theirs.advice
    assert captured[-1].status == "stalled" and "5 steps in a row" in captured[-1].advice


def test_a_loss_that_is_not_finite_changes_nothing():
    model, lm, closure = sine_fit()
    factor = torch.ones((), dtype=torch.float64)
    step = pgdfast.CapturedStep(lm, lambda: closure() * factor)
    step.step()
    before, mu = snapshot(model.parameters()), lm.report.next_damping
    factor.fill_(math.nan)
    assert math.isnan(float(step.step()))
    assert lm.report.status == "failed" and "not finite" in lm.report.advice
    assert unchanged(model.parameters(), before) and lm.report.next_damping == mu
    factor.fill_(1)
    step.step()
    assert lm.report.status == "accepted"


def test_what_the_closure_raises_at_a_trial_leaves_the_parameters():
    model, lm, closure = sine_fit()
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 4:   # two to look at the problem, the linearization, the trial
            raise MemoryError("no more")
        return closure()

    step, before = pgdfast.CapturedStep(lm, fails), snapshot(model.parameters())
    with pytest.raises(MemoryError, match="no more"):
        step.step()
    assert unchanged(model.parameters(), before) and all(p.requires_grad for p in model.parameters())


# --- beside ordinary steps ----------------------------------------------------------------------------------------------------


def test_ordinary_and_captured_steps_go_on_from_each_other():
    model, lm, closure, twin, captured, step = pair(damping=100.0, damping_rule=pgdfast.GainRatio(smallest=0.1))
    for k in range(24):
        lm.step(closure)
        step.step() if k // 3 % 2 else captured.step(step._closure)
        assert lm.report.attempts == 1
        agree(captured.report, lm.report)
    assert relative(flat(twin.parameters()), flat(model.parameters())) < 1e-11
    ours, theirs = (o.state_dict()["state"][0] for o in (captured, lm))
    assert ours["step"] == theirs["step"] == 24
    assert ours["members"][0]["damping"] == pytest.approx(theirs["members"][0]["damping"], rel=1e-9)


@pytest.mark.parametrize("rule", ["constant", "gain-ratio", "delayed"])
def test_resuming_is_bit_for_bit(rule):
    """From amid the attempts of one step, too."""
    model, lm, closure = sine_fit(damping=1e-9, damping_rule=rule)
    step = pgdfast.CapturedStep(lm, closure)
    for _ in range(3):
        step.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(lm.state_dict())
    for _ in range(9):
        step.step()
    twin, other, same = sine_fit(damping=1e-9, damping_rule=rule)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    resumed = pgdfast.CapturedStep(other, same)
    for _ in range(9):
        resumed.step()
    assert torch.equal(flat(twin.parameters()), flat(model.parameters()))
    assert other.report.next_damping == lm.report.next_damping
    assert other.state_dict()["state"][0]["step"] == lm.state_dict()["state"][0]["step"] == 12


def test_a_state_that_is_loaded_counts_and_unread_steps_do_not():
    model, lm, closure = sine_fit()
    step = pgdfast.CapturedStep(lm, closure)
    step.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(lm.state_dict())
    step.step()
    after = flat(model.parameters())
    for _ in range(3):
        step.step()
    model.load_state_dict(weights)
    lm.load_state_dict(state)
    step.step()
    assert torch.equal(flat(model.parameters()), after) and lm.state_dict()["state"][0]["step"] == 2


def test_copies_know_of_the_steps():
    _, lm, closure = sine_fit()
    step = pgdfast.CapturedStep(lm, closure)
    for _ in range(3):
        step.step()
    mu = lm.report.next_damping
    twin = copy.deepcopy(lm)
    assert memory_of(twin)["step"] == 3 and memory_of(twin)["members"][0]["damping"] == mu


@pytest.mark.parametrize("rule", ["constant", "gain-ratio", "delayed"])
def test_pickles_and_copies_after_captured_steps_go_on_bit_for_bit(rule):
    model, lm, closure = sine_fit(damping=1e-3, damping_rule=rule)
    step = pgdfast.CapturedStep(lm, closure)
    for _ in range(4):
        step.step()
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    ends = []
    for twin, copied in (pickle.loads(pickle.dumps((model, lm))), copy.deepcopy((model, lm))):
        assert copied.report.loss == lm.report.loss and str(copied.report) == str(lm.report)
        for _ in range(3):
            copied.step(lambda twin=twin: F.mse_loss(twin(x), torch.sin(5 * x)))
        ends.append(flat(twin.parameters()))
    for _ in range(3):
        lm.step(closure)
    assert all(torch.equal(end, flat(model.parameters())) for end in ends)


def test_two_captured_steps_share_an_optimizer():
    model, lm, closure, twin, captured, step = pair(damping=100.0)
    second = pgdfast.CapturedStep(captured, step._closure)
    for k in range(9):
        lm.step(closure)
        (second if k % 2 else step).step()
        agree(captured.report, lm.report)
    assert relative(flat(twin.parameters()), flat(model.parameters())) < 1e-11


def test_learning_rate_schedulers():
    _, lm, closure = sine_fit(lr=1.0)
    step = pgdfast.CapturedStep(lm, closure)
    scheduler = torch.optim.lr_scheduler.StepLR(lm, 2, 0.5)
    for _ in range(4):
        step.step()
        scheduler.step()
    assert float(step._numbers.rates) == 0.5 and lm.param_groups[0]["lr"] == 0.25


# --- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "named"), [
    ({"solver": "cg"}, "solver='cg'"),
    ({"solver": "lsmr"}, "solver='lsmr'"),
    ({"solver": "eigh"}, "solver='eigh'"),
    ({"line_search": "armijo"}, "a line_search"),
    ({"acceleration": "chord"}, "acceleration"),
    ({"momentum": 0.5}, "momentum"),
    ({"norm_constraint": 1.0}, "norm_constraint"),
    ({"scaling": "marquardt"}, "scaling='marquardt'"),
    ({"damping_rule": "sweep"}, "damping rule Sweep"),
    ({"backend": "reference"}, "backend='reference'"),
    ({"damping": 0.0}, "mu > 0"),
], ids=str)
def test_options_that_need_the_host(options, named):
    _, lm, closure = sine_fit(**options)
    with pytest.raises(ValueError, match="pgdfast.CapturedStep") as error:
        pgdfast.CapturedStep(lm, closure)
    assert named in str(error.value) and "ordinary steps" in str(error.value)


def test_other_optimizers_and_ensembles():
    model, _, closure = sine_fit()
    with pytest.raises(TypeError, match="got Adam"):
        pgdfast.CapturedStep(torch.optim.Adam(model.parameters()), closure)
    with pytest.raises(ValueError, match="an ensemble"):
        pgdfast.CapturedStep(pgdfast.LM([torch.zeros(3, 2, requires_grad=True)], ensemble=3), closure)


def refused(closure, match, **options):
    model, lm, _ = sine_fit(**options)
    before = snapshot(model.parameters())
    with pytest.raises(ValueError, match=match):
        pgdfast.CapturedStep(lm, lambda: closure(model)).step()
    assert unchanged(model.parameters(), before)


def test_closures_that_need_the_host(monkeypatch):
    monkeypatch.setattr(sys.modules["pgdfast.linear.linearization"], "_announced", set())   # said once in a process
    x = rand(12, 1)
    refused(lambda m: F.dropout(m(x), 0.5), r"draws random numbers \(cpu\)")
    refused(lambda m: m(x[:0]), "no residuals")
    refused(lambda m: m(x)[torch.tensor([3, 1, 2])], "picks rows of what the model computed")
    refused(lambda m: m(x) * math.nan, "nothing was changed")
    forget_rules(monkeypatch, "CumsumBackward0")
    with pytest.warns(UserWarning, match="no tape rule"):
        refused(lambda m: m(x).cumsum(0), "no tape rule for CumsumBackward0")


def test_random_numbers_where_nothing_is_tried():
    model, lm, _ = sine_fit(damping_rule="constant")
    x = rand(12, 1)
    step = pgdfast.CapturedStep(lm, lambda: model(x + 0.1 * torch.randn(12, 1, dtype=torch.float64)) - x)
    assert float(step.step()) != float(step.step()) and lm.report.status == "accepted"


def test_parameters_that_have_changed():
    model, lm, closure = sine_fit()
    step = pgdfast.CapturedStep(lm, closure)
    step.step()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="Make a new"):
        step.step()


def test_too_large_for_a_factor(monkeypatch):
    choice = sys.modules["pgdfast.solve.choice"]
    monkeypatch.setattr(choice, "FITS", 0.0)   # asks how much memory there is, whatever is needed
    monkeypatch.setattr(choice, "memory_limit", lambda device: 1e3)
    refused(lambda m: m(rand(12, 1)), "cg would solve for the steps of M = 12 residuals")
