"""The optimizer: damping rules, acceptance, undo, state, groups, and PyTorch's habits around it."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EVERYWHERE,
    RULES,
    SOLVERS,
    fit,
    flat,
    mlp,
    rand,
    relative,
    snapshot,
    through_a_file,
    unchanged,
)

import pgdfast
from pgdfast import reference

X, Y = rand(12, 2, seed=1), rand(12, 1, seed=2)


# --- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_constant_rule_takes_the_damped_step(backend, lr):
    params, closure = fit()
    before, ref = flat(params), reference.linearize(closure, params)
    optimizer = pgdfast.LM(params, lr=lr, damping=0.1, damping_rule="constant", backend=backend)
    loss = optimizer.step(closure)
    assert loss.shape == () and not loss.requires_grad and relative(loss, ref.loss) < 1e-14
    assert relative(before - flat(params), lr * reference.solve(ref, 0.1).step) < 1e-9
    report = optimizer.report
    assert (report.status, report.damping, report.next_damping, report.trials) == (
        "accepted",
        0.1,
        0.1,
        0,
    )
    assert (report.residuals, report.parameters) == (12, 25)
    assert report.loss == float(loss) and report.loss_after is None


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_descends(rule, solver, backend):
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=0.1, damping_rule=rule, solver=solver, backend=backend)
    losses = [float(optimizer.step(closure)) for _ in range(8)]
    assert losses[-1] < 0.2 * losses[0]
    if rule != "constant":
        assert all(b <= a for a, b in zip(losses[:-1], losses[1:], strict=True))


def test_two_groups_with_their_own_rates():
    params, closure = fit()
    ref = reference.linearize(closure, params)
    delta = reference.solve(ref, 0.1).step.split([p.numel() for p in params])
    before = snapshot(params)
    groups = [{"params": params[:2], "lr": 0.2}, {"params": params[2:]}]
    optimizer = pgdfast.LM(groups, lr=0.7, damping=0.1, damping_rule="constant")
    optimizer.step(closure)
    for p, q, d, lr in zip(params, before, delta, (0.2, 0.2, 0.7, 0.7), strict=True):
        assert relative(q - p, lr * d.view_as(p)) < 1e-9


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_gain_ratio_with_two_rates(backend):
    params, closure = fit()
    ref = reference.linearize(closure, params)
    rates = torch.cat(
        [
            torch.full_like(p, r).reshape(-1)
            for p, r in zip(params, (0.2, 0.2, 0.7, 0.7), strict=True)
        ]
    )
    d = reference.solve(ref, 0.1).step * rates.detach()
    groups = [{"params": params[:2], "lr": 0.2}, {"params": params[2:], "lr": 0.7}]
    optimizer = pgdfast.LM(groups, damping=0.1, backend=backend)
    optimizer.step(closure)
    predicted = float(ref.vjp(ref.residual) @ d - 0.5 * ref.jvp(d).square().sum())
    report = optimizer.report
    assert report.predicted_reduction == pytest.approx(predicted, rel=1e-9)
    assert report.loss_after == pytest.approx(closure().item(), rel=1e-14)
    assert report.gain_ratio == pytest.approx(
        (report.loss - report.loss_after) / predicted, rel=1e-9
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", [0.1, (0.1, 0.0)])
def test_weight_decay_is_decoupled(rule, decay):
    ends = []
    for wd in (0.0, decay):
        params, closure = fit()
        before = snapshot(params)
        wd = wd if isinstance(wd, tuple) else (wd, wd)
        groups = [
            {"params": params[:2], "weight_decay": wd[0]},
            {"params": params[2:], "weight_decay": wd[1]},
        ]
        pgdfast.LM(groups, lr=0.5, damping=0.1, damping_rule=rule).step(closure)
        ends.append(params)
    for plain, decayed, old, c in zip(*ends, before, (wd[0], wd[0], wd[1], wd[1]), strict=True):
        assert relative(plain - decayed, 0.5 * c * old) < 1e-12


# --- PyTorch's habits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=10, cycle_momentum=False),
    ],
    ids=["StepLR", "LambdaLR", "CosineAnnealingLR", "OneCycleLR"],
)
def test_learning_rate_schedulers(make):
    params, closure = fit()
    optimizer = pgdfast.LM(params, lr=0.8, damping=0.1, damping_rule="constant")
    scheduler = make(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            lr, before = optimizer.param_groups[0]["lr"], flat(params)
            delta = reference.solve(reference.linearize(closure, params), 0.1).step
            optimizer.step(closure)
            scheduler.step()
            assert relative(before - flat(params), lr * delta) < 1e-9
    assert optimizer.param_groups[0]["lr"] != 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
@pytest.mark.parametrize("rule", [*RULES, "schedule"])
def test_resuming_repeats_the_run_bit_for_bit(rule, scaling, dtype):
    def make(params):
        if rule == "schedule":
            return pgdfast.LM(
                params, damping=lambda k: 0.1 / (1 + k), damping_rule="constant", scaling=scaling
            )
        return pgdfast.LM(
            params, damping=0.3, damping_rule=rule, scaling=scaling, weight_decay=1e-3
        )

    params, closure = fit(dtype)
    optimizer = make(params)
    for _ in range(5):
        optimizer.step(closure)
    saved, state = snapshot(params), through_a_file(optimizer.state_dict())
    for _ in range(5):
        optimizer.step(closure)
    others, closure = fit(dtype, seed=9)
    with torch.no_grad():
        for p, q in zip(others, saved, strict=True):
            p.copy_(q)
    resumed = make(others)
    resumed.load_state_dict(state)
    for _ in range(5):
        resumed.step(closure)
    assert unchanged(params, [p.detach() for p in others])
    assert resumed.report.damping == optimizer.report.damping
    assert resumed.report.next_damping == optimizer.report.next_damping


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_carry_on(copier):
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=0.3, scaling="marquardt", solver="dual")
    for _ in range(3):
        optimizer.step(closure)
    copied = copier(optimizer)
    others = copied.param_groups[0]["params"]
    assert unchanged(others, snapshot(params)) and others[0] is not params[0]
    net = lambda p: torch.tanh(X @ p[0].T + p[1]) @ p[2].T + p[3]  # noqa: E731
    closure = lambda: F.mse_loss(net(params), Y)  # noqa: E731
    for _ in range(3):
        optimizer.step(closure)
        copied.step(lambda: F.mse_loss(net(others), Y))
    assert relative(flat(others), flat(params)) < 1e-9


def test_zero_grad_and_gradients_are_left_alone():
    params, closure = fit()
    optimizer = pgdfast.LM(params)
    optimizer.zero_grad()
    optimizer.step(closure)
    assert all(p.grad is None for p in params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step(closure)
    assert torch.equal(params[0].grad, torch.ones_like(params[0]))
    optimizer.zero_grad()
    assert params[0].grad is None


def test_hooks_and_named_parameters():
    model = mlp(2, 3, 1)
    optimizer = pgdfast.LM(model.named_parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("before"))
    optimizer.register_step_post_hook(lambda *a: calls.append("after"))
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert (
        calls == ["before", "after"] and optimizer.param_groups[0]["param_names"][0] == "0.weight"
    )


def test_adding_a_group_between_steps():
    params, closure = fit()
    optimizer = pgdfast.LM(params[:2])
    optimizer.step(closure)
    before = snapshot(params)
    optimizer.add_param_group({"params": params[2:]})
    optimizer.step(closure)
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_string_of_the_report():
    params, closure = fit()
    optimizer = pgdfast.LM(params, damping=0.1, solver="cg")
    assert optimizer.report.status == "none" and optimizer.report.advice == "no step was taken yet"
    optimizer.step(closure)
    assert str(optimizer.report).startswith("accepted: loss ") and "cg (" in str(optimizer.report)
    assert set(optimizer.report.seconds) >= {"linearize", "solve", "trial"}
    text = repr(optimizer)
    assert text.startswith("LM (") and "lr: 1.0" in text and "weight_decay: 0.0" in text


# --- misuse ---------------------------------------------------------------------------------------

OPTIONS = {
    "lr": (dict(lr=-1.0), "lr is -1.0; it must be a finite number"),
    "lr nan": (dict(lr=math.nan), "lr is nan"),
    "lr text": (dict(lr="1"), "lr is '1'"),
    "damping": (
        dict(damping=-1e-3),
        "damping is -0.001; it must be None, a finite number >= 0 or a callable",
    ),
    "damping infinite": (dict(damping=math.inf), "damping is inf"),
    "damping text": (dict(damping="small"), "damping is 'small'"),
    "schedule under a rule": (
        dict(damping=lambda k: 1.0),
        "damping is a schedule but damping_rule is 'auto'.*'constant'",
    ),
    "rule": (
        dict(damping_rule="fixed"),
        "damping_rule 'fixed' is not available; use one of auto, constant, gain-ratio, delayed",
    ),
    "scaling": (
        dict(scaling="diagonal"),
        "unknown scaling 'diagonal'; use 'auto', 'identity' or 'marquardt'",
    ),
    "weight_decay": (dict(weight_decay=-0.1), "weight_decay is -0.1"),
    "solver": (
        dict(solver="qr"),
        "solver 'qr' is not available; use one of auto, dual, primal, cg, eigh",
    ),
    "search": (
        dict(line_search="wolfe"),
        "unknown line_search 'wolfe'; use None, 'armijo', or an object",
    ),
    "rcond": (dict(rcond=0.0), "rcond is 0.0; it must lie between 0 and 1"),
    "rcond large": (dict(rcond=2), "rcond is 2"),
    "backend": (dict(backend="numpy"), "unknown backend 'numpy'; use one of auto, native"),
    "ensemble": (
        dict(ensemble=0),
        "ensemble is 0; it must be None or the number of members, 1 or more",
    ),
    "acceleration": (dict(acceleration="fast"), "acceleration.*'fast'"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option(name):
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match="(?s)pgdfast.*" + message):
        pgdfast.LM(fit()[0], **options)


@pytest.mark.parametrize(
    "options", [dict(damping_rule=object()), dict(line_search=object()), dict(damping_rule=3)]
)
def test_objects_without_the_verbs(options):
    with pytest.raises(TypeError, match="pgdfast.LM: .* (is no pgdfast.DampingRule|has no search)"):
        pgdfast.LM(fit()[0], **options)


def test_cg_options_of_the_wrong_kind():
    with pytest.raises((TypeError, ValueError), match="cg"):
        pgdfast.LM(fit()[0], cg=100)


def test_step_without_a_closure():
    with pytest.raises(ValueError, match=r"needs a closure.*pass step\(closure\)"):
        pgdfast.LM(fit()[0]).step()


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        pgdfast.LM([])
    params, closure = fit()
    for p in params:
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient; unfreeze one"):
        pgdfast.LM(params).step(closure)


def test_backend_from_outside(monkeypatch):
    params, closure = fit()
    monkeypatch.setenv("PGDFAST_BACKEND", "reference")
    optimizer = pgdfast.LM(params)
    optimizer.step(closure)
    assert optimizer.report.reason == "reference"
    monkeypatch.setenv("PGDFAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        pgdfast.LM(params)
