"""LM, then a first-order optimizer: the two phases, the state, and PyTorch's habits around them."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import fit, mlp, perturb, rand, relative, snapshot, through_a_file, unchanged
from hybrids import FIRST_ORDER, SWITCHES, hybrid, outputs, steps, switch_step

import pgdfast

# --- the two phases -------------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", FIRST_ORDER)
def test_it_is_lm_and_then_the_other_bit_for_bit(first_order):
    params, closure = fit()
    optimizer = hybrid(params, 3, first_order)
    losses = steps(optimizer, closure, 7)

    others, closure = fit()
    lm, expected = pgdfast.LM(others, damping=0.3), []
    expected += steps(lm, closure, 3)
    other = FIRST_ORDER[first_order](others)
    for _ in range(4):
        loss = closure()
        other.zero_grad()
        loss.backward()
        other.step()
        expected.append(loss.item())
    assert losses == expected and unchanged(params, snapshot(others))
    assert (optimizer.phase, optimizer.steps, optimizer.switched_at) == ("first_order", 7, 3)
    assert optimizer.why == "3 LM steps were taken"


def test_the_phase_groups_state_and_report_are_those_of_the_active_optimizer():
    params, closure = fit()
    optimizer = hybrid(params, 2)
    assert optimizer.active is optimizer.lm and optimizer.report.status == "none"
    assert optimizer.param_groups is optimizer.lm.param_groups and optimizer.param_groups[0]["lr"] == 1.0
    optimizer.step(closure)
    assert optimizer.switched_at is None and optimizer.why == "" and optimizer.report is optimizer.lm.report
    optimizer.step(closure)   # the switch stands behind the second LM step, whose report is still the last
    assert optimizer.active is optimizer.first_order and optimizer.report is optimizer.lm.report
    assert optimizer.param_groups is optimizer.first_order.param_groups and optimizer.param_groups[0]["lr"] == 1e-2
    loss = optimizer.step(closure)
    assert optimizer.state is optimizer.first_order.state and "exp_avg" in optimizer.state[params[0]]
    report = optimizer.report
    assert (report.loss, report.status, report.solver, report.parameters) == (float(loss), "accepted", "AdamW", 25)
    assert report.reason == optimizer.why and str(report).startswith("accepted: loss ")
    assert loss.shape == () and not loss.requires_grad


@pytest.mark.parametrize("form", ["tensor", "tuple"])
def test_residuals_are_half_their_sum_of_squares_in_both_phases(form):
    w, targets = rand(4, seed=1).requires_grad_(), rand(4, seed=2)

    def closure():
        r = 2 * w - targets
        return r if form == "tensor" else (r[:1], r[1:])

    lm = pgdfast.LM([w], damping=1.0, damping_rule="constant", lr=0.1)
    optimizer = pgdfast.Hybrid(lm, torch.optim.SGD([w], lr=0.01), 1)
    optimizer.step(closure)
    before, r = w.detach().clone(), 2 * w.detach() - targets
    loss = optimizer.step(closure)
    assert float(loss) == pytest.approx(0.5 * float(r.square().sum()), rel=1e-14)
    assert relative(w, before - 0.01 * 2 * r) < 1e-15


def test_the_second_phase_clears_old_gradients_and_needs_no_grad_mode():
    params, closure = fit()
    optimizer = hybrid(params, 1, "sgd")
    optimizer.step(closure)
    for p in params:
        p.grad = torch.full_like(p, 1e6)
    with torch.no_grad():
        optimizer.step(closure)
    before = snapshot(params)
    expected = torch.autograd.grad(closure(), params)
    optimizer.step(closure)
    assert all(relative(p.grad, g) < 1e-15 for p, g in zip(params, expected, strict=True))
    assert not unchanged(params, before)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_frozen_parameters_stay():
    params, closure = fit()
    params[0].requires_grad_(False)
    before = params[0].clone()
    steps(hybrid(params, 2), closure, 4)
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("taken", [0, 2], ids=["first phase", "second phase"])
def test_what_a_closure_raises_changes_nothing(taken):
    params, closure = fit()
    optimizer = hybrid(params, 2)
    steps(optimizer, closure, taken)
    before = snapshot(params)

    def broken():
        raise KeyError("no data")

    with pytest.raises(KeyError, match="no data"):
        optimizer.step(broken)
    with pytest.raises(ValueError, match="the loss before the step is nan; nothing was changed"):
        optimizer.step(lambda: closure() * math.nan)
    with pytest.raises(ValueError, match=r"Hybrid.step: needs a closure.*pass step\(closure\)"):
        optimizer.step()
    assert unchanged(params, before) and optimizer.steps == taken
    optimizer.step(closure)
    assert optimizer.steps == taken + 1


def test_the_second_phase_refuses_what_the_first_would():
    params, closure = fit()
    optimizer = hybrid(params, 1)
    optimizer.step(closure)
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        optimizer.step(lambda: torch.tensor(1.0))
    with pytest.raises(ValueError, match="closure returned NoneType; return the loss or the residual"):
        optimizer.step(lambda: None)


def test_an_empty_batch_changes_nothing_in_both_phases():
    params, closure = fit()
    optimizer = hybrid(params, 2)
    optimizer.step(closure)
    for _ in range(3):
        before = snapshot(params)
        assert float(optimizer.step(lambda: (params[0] * rand(6, 2))[:0])) == 0.0
        assert optimizer.report.status == "empty" and unchanged(params, before)
    assert optimizer.phase == "first_order"


# --- what it refuses ------------------------------------------------------------------------------


def test_optimizers_over_other_parameters_are_named():
    params, _ = fit()
    lm = pgdfast.LM(params)
    with pytest.raises(ValueError, match=r"Hybrid: first_order lacks parameter 2 of group 0 \(1, 6\), .* of LM; build both"):
        pgdfast.Hybrid(lm, torch.optim.AdamW(params[:2]))
    extra = rand(3).requires_grad_()
    with pytest.raises(ValueError, match=r"Hybrid: lm lacks parameter 4 of group 0 \(3,\) of AdamW; build both"):
        pgdfast.Hybrid(lm, torch.optim.AdamW([*params, extra]))
    with pytest.raises(ValueError, match="first_order lacks .* and 1 more of LM and lm lacks parameter 0"):
        pgdfast.Hybrid(lm, torch.optim.AdamW([extra]))
    named = pgdfast.LM(mlp(2, 3, 1).named_parameters())
    with pytest.raises(ValueError, match=r"first_order lacks 0.weight \(3, 2\), 0.bias"):
        pgdfast.Hybrid(named, torch.optim.SGD(params, lr=0.1))


def test_groups_may_differ():
    params, closure = fit()
    groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2]}]
    optimizer = pgdfast.Hybrid(pgdfast.LM(params), torch.optim.AdamW(groups), 1)
    steps(optimizer, closure, 2)
    assert len(optimizer.param_groups) == 2


REFUSED = {
    "lm of another kind": (lambda p: (torch.optim.Adam(p), torch.optim.Adam(p), 3), TypeError, "lm is of type Adam; it"),
    "no optimizer": (lambda p: (pgdfast.LM(p), torch.optim.Adam, 3), TypeError, "is the class Adam.* must be a torch"),
    "LM twice": (lambda p: (pgdfast.LM(p), pgdfast.LM(p), 3), TypeError, "of type LM, whose step needs a closure"),
    "LBFGS": (lambda p: (pgdfast.LM(p), torch.optim.LBFGS(p), 3), TypeError, "of type LBFGS, whose step needs a closure"),
    "zero": (lambda p: (pgdfast.LM(p), torch.optim.Adam(p), 0), ValueError, "switch is 0; it must be a whole number of 1"),
    "a fraction": (lambda p: (pgdfast.LM(p), torch.optim.Adam(p), 2.5), TypeError, "switch=2.5 lacks over, state_dict"),
    "true": (lambda p: (pgdfast.LM(p), torch.optim.Adam(p), True), TypeError, "switch=True lacks over"),
    "a class": (lambda p: (pgdfast.LM(p), torch.optim.Adam(p), pgdfast.Plateau), TypeError, "is a class; give a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match="pgdfast.Hybrid: .*" + message):
        pgdfast.Hybrid(*make(fit()[0]))


def test_adding_a_group_is_refused_with_what_to_do():
    optimizer = hybrid(fit()[0])
    with pytest.raises(ValueError, match=r"add the parameters to both, hybrid.lm.add_param_group"):
        optimizer.add_param_group({"params": [rand(2).requires_grad_()]})


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SWITCHES)
@pytest.mark.parametrize("saved", ["at the start", "before", "at the switch", "after"])
def test_resuming_repeats_the_run_bit_for_bit(kind, saved):
    switched = switch_step(kind)
    taken = {"at the start": 0, "before": switched - 1, "at the switch": switched, "after": switched + 2}[saved]
    params, closure = fit()
    optimizer = hybrid(params, SWITCHES[kind](params), scaling="marquardt")
    steps(optimizer, closure, taken)
    kept, state = snapshot(params), through_a_file(optimizer.state_dict())
    losses = steps(optimizer, closure, 8)

    others, closure = fit()
    perturb(others, seed=9)
    resumed = hybrid(others, SWITCHES[kind](others), scaling="marquardt")
    with torch.no_grad():
        for p, q in zip(others, kept, strict=True):
            p.copy_(q)
    resumed.load_state_dict(state)
    assert (resumed.phase, resumed.steps) == ("lm" if taken < switched else "first_order", taken)
    assert steps(resumed, closure, 8) == losses
    assert unchanged(others, snapshot(params))
    assert (resumed.switched_at, resumed.why) == (optimizer.switched_at, optimizer.why)


def test_a_state_that_does_not_fit_changes_nothing():
    params, closure = fit()
    optimizer = hybrid(params, pgdfast.Plateau(5))
    steps(optimizer, closure, 3)
    state = optimizer.state_dict()
    bad = {
        "lacks switched_at, why": {k: v for k, v in state.items() if k not in ("switched_at", "why")},
        "saved with a switch of kind After, this one's is Plateau": state | {"switch_kind": "After"},
        "different number of parameter groups": state | {"first_order": {"state": {}, "param_groups": []}, "steps": 9},
    }
    before = copy.deepcopy(state)
    lm_state = {k: v for k, v in optimizer.lm.state.items()}
    for message, wrong in bad.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(copy.deepcopy(wrong))
        assert str(optimizer.state_dict()) == str(before)
        assert all(optimizer.lm.state[p] is s for p, s in lm_state.items())


def test_loading_does_not_tie_two_runs_together():
    params, closure = fit()
    optimizer = hybrid(params, pgdfast.Plateau(2, 0.999999))
    steps(optimizer, closure, 2)
    state = optimizer.state_dict()
    text = str(state)
    other = hybrid(params, pgdfast.Plateau(2, 0.999999))
    other.load_state_dict(state)
    steps(other, closure, 3)
    assert str(state) == text


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("kind", ["number", "drift"])
@pytest.mark.parametrize("taken", [2, 6])
def test_copies_carry_on(copier, kind, taken):
    params, closure = fit()
    targets = outputs(params).detach() - 1
    closure = lambda p: F.mse_loss(outputs(p), targets)  # noqa: E731
    optimizer = hybrid(params, SWITCHES[kind](params))
    steps(optimizer, lambda: closure(params), taken)
    copied = copier(optimizer)
    others = copied.lm.param_groups[0]["params"]
    assert unchanged(others, snapshot(params)) and others[0] is not params[0]
    assert others[0] is copied.first_order.param_groups[0]["params"][0]
    assert (copied.phase, copied.steps, copied.switched_at) == (optimizer.phase, taken, optimizer.switched_at)
    assert steps(copied, lambda: closure(others), 6) == steps(optimizer, lambda: closure(params), 6)
    assert unchanged(others, snapshot(params))


# --- PyTorch's habits -----------------------------------------------------------------------------


def test_a_scheduler_for_each_phase():
    params, closure = fit()
    optimizer = hybrid(params, 2)
    schedulers = {
        "lm": torch.optim.lr_scheduler.LambdaLR(optimizer.lm, lambda k: 1 / (1 + k)),
        "first_order": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.first_order, 10),
    }
    rates = []
    for _ in range(4):
        active = optimizer.phase
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(closure)
        schedulers[active].step()
    assert rates == pytest.approx([1.0, 0.5, 0.01, 0.005 * (1 + math.cos(math.pi / 10))])


def test_a_multiplying_scheduler_over_both():
    params, closure = fit()
    optimizer = hybrid(params, 2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        optimizer.step(closure)
        scheduler.step()
    assert optimizer.lm.param_groups[0]["lr"] == 0.5 and optimizer.first_order.param_groups[0]["lr"] == 0.0025


def test_it_is_an_optimizer_with_hooks_and_a_string():
    params, closure = fit()
    optimizer = hybrid(params, 2)
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("before"))
    optimizer.register_step_post_hook(lambda *a: calls.append("after"))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "phase lm, step 0, switch after 2 LM steps" in repr(optimizer) and "AdamW (" in repr(optimizer)
    steps(optimizer, closure, 3)
    assert calls == ["before", "after"] * 3
    assert "phase first_order, step 3, switched at 2: 2 LM steps were taken" in repr(optimizer)


def test_schedulers_made_before_the_hybrid():
    params, closure = fit()
    lm, adamw = pgdfast.LM(params), torch.optim.AdamW(params)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (lm, adamw)]
    optimizer = pgdfast.Hybrid(lm, adamw, 1)   # a scheduler wraps its optimizer's step
    for scheduler in schedulers:
        optimizer.step(closure)
        scheduler.step()
    assert (lm.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.5, 5e-4)
