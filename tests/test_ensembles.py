"""Ensembles: every member as it would be alone, and none in another's way."""

import copy
import gc
import io
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    NOISY_SINE,
    apart,
    flat,
    losses_of,
    memory_of,
    mlp,
    networks_of,
    nudged,
    rand,
    snapshot,
    stack_of,
)
from torch import nn

import pgdfast
from pgdfast import Delayed, GainRatio
from pgdfast.linear import ensemble as linear_ensemble

B = 4
X, Y = NOISY_SINE


OPTIONS = {
    "the paper's": dict(damping=0.1, damping_rule="constant", lr=0.05),
    "a schedule": dict(damping=lambda i: 0.1 * 0.9**i, damping_rule="constant", lr=0.1),
    "gain ratio": dict(damping_rule=GainRatio(smallest=1e-2)),
    "delayed": dict(damping_rule=Delayed(smallest=1e-2)),
    "line search": dict(damping=1e-2, damping_rule="constant", line_search="armijo"),
    "gain ratio with a line search": dict(damping_rule=GainRatio(smallest=1e-2), line_search="armijo"),
    "marquardt": dict(damping=0.1, damping_rule="constant", lr=0.2, scaling="marquardt"),
    "primal": dict(damping_rule=GainRatio(smallest=1e-2), solver="primal"),
    "primal, marquardt": dict(damping=0.1, damping_rule="constant", lr=0.2, solver="primal", scaling="marquardt"),
    "cg": dict(damping_rule=GainRatio(smallest=1e-1), solver="cg", cg=pgdfast.CG(500, 1e-13)),
    "cg, marquardt": dict(   # from a mu at which rounding does not grow
        damping=1e-2, damping_rule=GainRatio(smallest=1e-1), solver="cg", scaling="marquardt", cg=pgdfast.CG(500, 1e-13)),
    "cg, warm": dict(damping_rule=GainRatio(smallest=1e-1), solver="cg", cg=pgdfast.CG(500, 1e-13, warm_start=True)),
    "eigh": dict(damping_rule=GainRatio(smallest=1e-2), solver="eigh"),
    "lsmr": dict(damping_rule=GainRatio(smallest=1e-1), solver="lsmr", cg=pgdfast.CG(500, 1e-13)),
    "weight decay": dict(damping=0.1, damping_rule="constant", lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_trajectories_are_those_of_the_members_alone(name):
    """Float64, 30 steps, to 1e-10; or, where a rounding unit in the parameters grows beyond that, as well as can be said."""
    options = OPTIONS[name]
    alone, twins, networks = networks_of(B), [nudged(m) for m in networks_of(B)], stack_of(B)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=B, **options)
    optimizers = [pgdfast.LM(m.parameters(), **copy.deepcopy(options)) for m in alone]
    others = [pgdfast.LM(m.parameters(), **copy.deepcopy(options)) for m in twins]
    attempts = set()
    for _ in range(30):
        before = optimizer.step(losses_of(networks))
        for b in range(B):
            loss = optimizers[b].step(lambda m=alone[b]: F.mse_loss(m(X), Y))
            others[b].step(lambda m=twins[b]: F.mse_loss(m(X), Y))
            bound = max(1e-10, 100 * apart(alone[b], twins[b]))
            assert apart(networks.member(b), alone[b]) < bound < 1e-5
            assert abs(float(before[b]) - float(loss)) < bound
            report, wanted = optimizer.report[b], optimizers[b].report
            assert (report.status, report.attempts, report.solver) == (wanted.status, wanted.attempts, wanted.solver)
            assert math.isclose(report.next_damping, wanted.next_damping, rel_tol=1e-4)
            attempts.add(report.attempts)
    if name == "gain ratio":
        assert len(attempts) > 1, "some members should have been rejected while others were not"


def test_the_papers_lm_on_the_papers_network():
    """Task A: tanh 1-80-80-1, 100 points, lr 1e-2, mu 0.1, un-normalized residuals: 50 steps to 1e-10, without exception."""
    x = torch.linspace(-1, 1, 100, dtype=torch.float64)[:, None]
    y = sum(k * torch.sin((2 * k + 1) * math.pi * x - k) for k in (1, 2, 3)) / 3
    alone = networks_of(3, widths=(1, 80, 80, 1))
    networks = pgdfast.functional_ensemble(alone)
    options = dict(lr=1e-2, damping=0.1, damping_rule="constant")
    optimizer = pgdfast.LM(networks.parameters(), ensemble=3, **options)
    optimizers = [pgdfast.LM(m.parameters(), **options) for m in alone]
    for _ in range(50):
        optimizer.step(lambda: networks(x) - y)
        for m, o in zip(alone, optimizers, strict=True):
            o.step(lambda m=m: m(x) - y)
    assert all(apart(networks.member(b), m) < 1e-10 for b, m in enumerate(alone))


@pytest.mark.parametrize("name", ["the paper's", "gain ratio", "line search", "marquardt", "cg", "eigh", "lsmr"])
def test_kernels_that_do_not_know_members_apart(name):
    """The torch backend's sweeps serve all members at once."""
    options = OPTIONS[name] | {"cg": pgdfast.CG(60, 1e-13)}
    networks, known = stack_of(B), stack_of(B)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=B, **copy.deepcopy(options), backend="torch")
    other = pgdfast.LM(known.parameters(), ensemble=B, **copy.deepcopy(options))
    for _ in range(3):
        optimizer.step(losses_of(networks))
        other.step(losses_of(known))
        assert optimizer.report.status == other.report.status and optimizer.report.solver == other.report.solver
    for p, q in zip(networks.parameters(), known.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-7, atol=1e-9)


def test_float32_follows_the_members_alone():
    alone, networks = networks_of(B, dtype=torch.float32), stack_of(B, dtype=torch.float32)
    x, y = X.float(), Y.float()
    options = OPTIONS["the paper's"]
    optimizer = pgdfast.LM(networks.parameters(), ensemble=B, **options)
    optimizers = [pgdfast.LM(m.parameters(), **options) for m in alone]
    for _ in range(30):
        before = optimizer.step(losses_of(networks, x, y))
        for b, (m, o) in enumerate(zip(alone, optimizers, strict=True)):
            assert math.isclose(float(before[b]), float(o.step(lambda m=m: F.mse_loss(m(x), y))), rel_tol=1e-4)


def test_float32_sums_in_float64_member_by_member():
    plain = dict(damping_rule="constant", lr=1e-3)
    networks, dampings = stack_of(B, dtype=torch.float32), [1.0, 1e-7, 1.0, 1e-7]
    optimizer = pgdfast.LM(networks.parameters(), ensemble=B, damping=dampings, **plain)
    optimizer.step(losses_of(networks, X.float(), Y.float()))
    wide = []
    for m, mu in zip(networks_of(B, dtype=torch.float32), dampings, strict=True):
        alone = pgdfast.LM(m.parameters(), damping=mu, **plain)
        alone.step(lambda m=m: F.mse_loss(m(X.float()), Y.float()))
        wide.append(memory_of(alone)["members"][0]["wide"])
    assert [m["wide"] for m in memory_of(optimizer)["members"]] == wide and len(set(wide)) == 2


def test_members_have_their_own_rates_and_dampings():
    rates, dampings = [0.1, 0.2, 0.3, 0.4], [1.0, 0.1, 0.01, 0.5]
    alone, networks = networks_of(B), stack_of(B)
    groups = [{"params": [p], "lr": rates if k % 2 == 0 else 0.05} for k, p in enumerate(networks.parameters())]
    optimizer = pgdfast.LM(groups, ensemble=B, damping=dampings, damping_rule="constant", line_search="armijo")
    for _ in range(5):
        optimizer.step(losses_of(networks))
    for b, m in enumerate(alone):
        groups = [{"params": [p], "lr": rates[b] if k % 2 == 0 else 0.05} for k, p in enumerate(m.parameters())]
        o = pgdfast.LM(groups, damping=dampings[b], damping_rule="constant", line_search="armijo")
        for _ in range(5):
            o.step(lambda m=m: F.mse_loss(m(X), Y))
        assert float((flat(networks.member(b).parameters()) - flat(m.parameters())).abs().max()) < 1e-10
        assert optimizer.report[b].damping == dampings[b]


def test_residual_closures_are_summed_per_member():
    networks, means = stack_of(B), stack_of(B)
    a = pgdfast.LM(networks.parameters(), ensemble=B, damping=0.3)
    b = pgdfast.LM(means.parameters(), ensemble=B, damping=0.3)
    first = a.step(lambda: networks(X) - Y)
    second = b.step(lambda: ((means(X) - Y) ** 2).sum((1, 2)) / 2)
    assert torch.allclose(first, second, rtol=1e-14) and first.shape == (B,)
    for p, q in zip(networks.parameters(), means.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_member_that_is_lost_stays_and_disturbs_nobody(backend):
    healthy, networks = stack_of(B), stack_of(B)
    bad = [p.detach()[1].clone().fill_(math.nan) for p in networks.parameters()][0]
    with torch.no_grad():
        next(iter(networks.parameters()))[1] = bad
    lost = [p.detach()[1].clone() for p in networks.parameters()]
    one = pgdfast.LM(networks.parameters(), ensemble=B, backend=backend)
    two = pgdfast.LM(healthy.parameters(), ensemble=B, backend=backend)
    for _ in range(5):
        found, wanted = one.step(losses_of(networks)), two.step(losses_of(healthy))
        assert math.isnan(float(found[1])) and torch.equal(found[[0, 2, 3]], wanted[[0, 2, 3]])
    for p, q, kept in zip(networks.parameters(), healthy.parameters(), lost, strict=True):
        assert torch.equal(p[[0, 2, 3]], q[[0, 2, 3]])
        assert torch.equal(p[1].detach().nan_to_num(7), kept.nan_to_num(7))
    assert one.report.status[1] == "failed" and "its loss is nan" in one.report[1].advice
    assert "3 accepted" in str(one.report) and "1 failed" in str(one.report) and "member 1: its loss is nan" in str(one.report)
    with torch.no_grad():   # given new parameters it goes on
        for p, q in zip(networks.parameters(), healthy.parameters(), strict=True):
            p[1] = q[1]
    one.step(losses_of(networks))
    assert one.report.status[1] != "failed"


def test_no_member_goes_uphill():
    networks = stack_of(8)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=8, damping=1e-8)
    last = [math.inf] * 8
    for _ in range(30):
        optimizer.step(losses_of(networks))
        after = losses_of(networks)().tolist()
        assert all(a <= b for a, b in zip(after, last, strict=True))
        assert after == optimizer.report.loss_after
        last = after


def test_resuming_is_bit_for_bit():
    def run(networks, optimizer, steps):
        for _ in range(steps):
            optimizer.step(losses_of(networks))

    options = dict(ensemble=B, scaling="marquardt", line_search="armijo")
    straight = stack_of(B)
    optimizer = pgdfast.LM(straight.parameters(), **options)
    run(straight, optimizer, 8)
    broken = stack_of(B)
    first = pgdfast.LM(broken.parameters(), **options)
    run(broken, first, 5)
    file = io.BytesIO()
    torch.save((broken.state_dict(), first.state_dict()), file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    resumed = stack_of(B)
    resumed.load_state_dict(values)
    second = pgdfast.LM(resumed.parameters(), **options)
    second.load_state_dict(state)
    run(resumed, second, 3)
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.report.next_damping == second.report.next_damping


def test_an_exception_leaves_everything_as_it_was():
    networks = stack_of(B)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=B)
    optimizer.step(losses_of(networks))
    before, calls = snapshot(list(networks.parameters())), []

    def closure():
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return losses_of(networks)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(torch.equal(p.detach(), q) for p, q in zip(networks.parameters(), before, strict=True))


def test_one_tape_and_one_trial_serve_all():
    networks, calls = stack_of(16), []

    def closure():
        calls.append(torch.is_grad_enabled())
        return losses_of(networks)()

    optimizer = pgdfast.LM(networks.parameters(), ensemble=16)
    optimizer.step(closure)
    assert len(calls) == 1 + max(optimizer.report.attempts)


def test_copies_and_deep_copies_go_on_alone():
    networks = stack_of(B)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=B)
    optimizer.step(losses_of(networks))
    other = copy.deepcopy(networks)
    assert all(torch.equal(p, q) and p is not q for p, q in zip(networks.parameters(), other.parameters(), strict=True))
    twin = copy.deepcopy(optimizer)
    assert twin.report.loss == optimizer.report.loss
    optimizer.step(losses_of(networks))


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
def test_a_closure_without_tape_rules_trains_all_the_same():
    alone, networks = networks_of(B), stack_of(B)
    def bessel(out):
        return torch.special.i0(out) - Y

    options = dict(damping_rule=GainRatio(smallest=1e-2))
    optimizer = pgdfast.LM(networks.parameters(), ensemble=B, **options)
    optimizers = [pgdfast.LM(m.parameters(), **copy.deepcopy(options)) for m in alone]
    for _ in range(6):
        before = optimizer.step(lambda: bessel(networks(X)))
        for b, (m, o) in enumerate(zip(alone, optimizers, strict=True)):
            assert math.isclose(float(before[b]), float(o.step(lambda m=m: bessel(m(X)))), rel_tol=1e-9)


class Scaled(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.net, self.slope = mlp(1, 3, 1, seed=seed), nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("factor", torch.tensor(1.0 + seed, dtype=torch.float64))

    def forward(self, x):
        return self.factor * self.slope * self.net(x)


def test_functional_ensemble_of_a_function():
    networks = pgdfast.functional_ensemble(Scaled, 3)
    assert networks.count == 3 and networks(X).shape == (3, 24, 1)
    for b in range(3):
        assert torch.allclose(networks(X)[b], Scaled(b)(X), rtol=1e-13)
        assert torch.equal(networks.member(b)(X), Scaled(b)(X)) and torch.equal(networks.member(b).factor, Scaled(b).factor)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=3)
    first = optimizer.step(losses_of(networks))
    assert bool((losses_of(networks)() < first).all())


def test_functional_ensemble_of_a_module_draws_the_others():
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    networks = pgdfast.functional_ensemble(module, 3)
    assert torch.allclose(networks(X)[0], module(X), rtol=1e-13)
    weights = networks.get_parameter("0_weight")
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    each = rand(3, 5, 1)
    outputs = networks(each, each=True)
    assert torch.allclose(outputs[2], networks.member(2)(each[2]), rtol=1e-13)
    frozen = copy.deepcopy(module)
    frozen[0].weight.requires_grad_(False)
    assert not pgdfast.functional_ensemble(frozen, 2).get_parameter("0_weight").requires_grad


def test_residuals_with_derivatives_of_the_network():
    networks = stack_of(3)

    def slope(net):
        return torch.vmap(torch.func.grad(lambda t: net(t[None])[0, 0]))(X)[:, 0] - 1

    found = networks.map(slope)
    for b in range(3):
        x = X.clone().requires_grad_()
        wanted = torch.autograd.grad(networks.member(b)(x).sum(), x)[0][:, 0] - 1
        assert torch.allclose(found[b], wanted, rtol=1e-12)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=3)
    first = optimizer.step(lambda: networks.map(slope))
    assert bool((networks.map(slope).square().sum(1) / 2 < first).all())


BAD = {
    "B = 0": (dict(ensemble=0), "ensemble is 0; it must be None or the number of members, 1 or more"),
    "no number": (dict(ensemble="4"), "ensemble is '4'; it must be None or the number of members"),
    "another B": (dict(ensemble=B + 1), rf"parameter 0 of an ensemble of 5 has shape \({B}, 5, 1\); every parameter needs"),
    "rates": (dict(ensemble=B, lr=[1.0, 2.0]), r"lr of an ensemble of 4 is \[1.0, 2.0\]; it must be a finite number"),
    "dampings": (dict(ensemble=B, damping=[1.0, -1.0, 1.0, 1.0]), "damping of an ensemble of 4 is"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        pgdfast.LM(stack_of(B).parameters(), **options)


def test_bad_members():
    with pytest.raises(ValueError, match=r"member 1 has 0.weight as \(\(6, 1\), .*member 0 as \(\(5, 1\)"):
        pgdfast.functional_ensemble([mlp(1, 5, 1), mlp(1, 6, 1)])
    with pytest.raises(ValueError, match="count is 0; it must be the number of members"):
        pgdfast.functional_ensemble(mlp(1, 5, 1), 0)
    with pytest.raises(ValueError, match="2 modules were given for count=3"):
        pgdfast.functional_ensemble([mlp(1, 5, 1), mlp(1, 5, 1)], 3)
    with pytest.raises(ValueError, match="no modules were given"):
        pgdfast.functional_ensemble([])
    with pytest.raises(ValueError, match=r"Scaled \(the module itself\) has parameters but no reset_parameters"):
        pgdfast.functional_ensemble(Scaled(0), 2)
    with pytest.raises(IndexError, match="there is no member 4; they are numbered 0 to 3"):
        stack_of(B).member(4)


def test_a_bad_closure_changes_nothing():
    networks = stack_of(B)
    optimizer, before = pgdfast.LM(networks.parameters(), ensemble=B), snapshot(list(networks.parameters()))
    with pytest.raises(ValueError, match=r"ensemble of 4 returned \(\); it must return 4 losses, shape \(4,\)"):
        optimizer.step(lambda: losses_of(networks)().mean())
    assert all(torch.equal(p.detach(), q) for p, q in zip(networks.parameters(), before, strict=True))


def test_a_hybrid_is_for_one_network():
    networks = stack_of(B)
    parameters = list(networks.parameters())
    with pytest.raises(ValueError, match="lm trains an ensemble of 4, whose members would switch apart"):
        pgdfast.Hybrid(pgdfast.LM(parameters, ensemble=B), torch.optim.SGD(parameters, lr=0.1))


@pytest.mark.parametrize("options", [{}, {"backend": "torch"}, {"solver": "eigh"}, {"solver": "cg"}], ids=str)
def test_no_tape_outlives_its_step(options, monkeypatch):
    """Reference counts alone must free a step's tape: it is large, and the collector counts objects, not bytes."""
    made, kind = [], linear_ensemble.EnsembleLinearization
    create = kind.__init__

    def spy(self, *arguments):
        made.append(weakref.ref(self))
        create(self, *arguments)

    monkeypatch.setattr(kind, "__init__", spy)
    networks = stack_of(B)
    optimizer = pgdfast.LM(networks.parameters(), ensemble=B, **options)
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            optimizer.step(losses_of(networks))
        assert len(made) == 4 and sum(lin() is not None for lin in made) <= 1
    finally:
        gc.enable()
