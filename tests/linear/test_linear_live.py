"""Constants that the closure changes in place at its trials: later solves of a step still pair old with old."""

import pytest
import torch
from helpers import BACKENDS, TIGHT, flat, mlp, perturb, rand, relative, snapshot

import pgdfast
from pgdfast import reference
from pgdfast.linear import EnsembleLinearizer, Linearizer, live

X = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
pytestmark = pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")


def averaged(model, w, x):
    r = model(x) - torch.sin(3 * x)
    w.mul_(0.9).add_(0.5 * r.detach().abs())
    return w * r


def reweighted(model, w, x):
    r = model(x) - torch.sin(3 * x)
    w.copy_(r.detach().square().add(0.1).rsqrt())
    return (w * r).square().mean()


def noisy(model, w, x):
    w.normal_()
    return model(x + 0.1 * w) - torch.sin(3 * x)


def by_autograd(model, w, x):
    w.add_(0.5)
    return (w * model(x)).cumsum(0)


CLOSURES = {"average": averaged, "weights": reweighted, "inputs": noisy, "fallback": by_autograd}


def problem(name, dtype=torch.float64):
    model, w, x = mlp(1, 10, 1, dtype=dtype), torch.ones(20, 1, dtype=dtype), X.to(dtype)
    return model, w, lambda: CLOSURES[name](model, w, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CLOSURES)
def test_later_solves_of_a_step(name, dtype, backend):
    model, w, closure = problem(name, dtype)
    linearizer = Linearizer(model.parameters(), backend)
    for _ in range(4):   # new, recorded, replayed, replayed
        lin = linearizer(closure)
        mu, first = 1e-3 * float(lin.diagonal().sum()), {}
        for solver in ("dual", "primal"):
            first[solver] = [pgdfast.solve(lin, k * mu, solver=solver).step for k in (1, 10)]
        gradient = lin.gradient()
        lin.before_trial()
        for k in range(2):
            before, start = w.clone(), snapshot(linearizer.params)
            perturb(linearizer.params, seed=k)
            closure()
            assert not torch.equal(w, before)
            with torch.no_grad():
                for p, q in zip(linearizer.params, start, strict=True):
                    p.copy_(q)
            lin.parameters_unchanged()
            assert torch.equal(lin.gradient(), gradient)
            for solver, steps in first.items():
                for k, step in zip((1, 10), steps, strict=True):
                    assert relative(pgdfast.solve(lin, k * mu, solver=solver).step, step) < 1e-9
                    wide = pgdfast.solve(lin, k * mu, solver="cg", cg=TIGHT).step
                    assert relative(wide, step) < (1e-7 if dtype == torch.float64 else 1e-3)
        lin.release()


def test_a_step_after_rejections_is_that_of_the_first_tape():
    model, w, _ = problem("average")
    params, calls, seen = list(model.parameters()), [0], {}
    optimizer = pgdfast.LM(params, damping=1e-2, damping_rule="delayed")

    def closure():
        calls[0] += 1
        r = averaged(model, w, X)
        if calls[0] == 1:
            seen["w"], seen["theta"] = w.clone(), flat(params)
        return r if calls[0] != 2 else 1e3 * r

    for _ in range(4):
        calls[0] = 0
        optimizer.step(closure)
        assert optimizer.report.attempts >= 2
        end = flat(params)
        torch.nn.utils.vector_to_parameters(seen["theta"], params)
        ref = reference.linearize(lambda: seen["w"] * (model(X) - torch.sin(3 * X)), params)
        step = reference.solve(ref, optimizer.report.damping).step
        assert relative(seen["theta"] - end, step) < 1e-9 or optimizer.report.status != "accepted"
        torch.nn.utils.vector_to_parameters(end, params)


def test_ensembles():
    one = pgdfast.functional_ensemble([mlp(1, 6, 1, seed=b) for b in range(3)])
    w = torch.ones(20, 1, dtype=torch.float64)
    linearizer = EnsembleLinearizer(list(one.parameters()), 3)

    def closure():
        w.mul_(1.5)
        return w * one(X)

    for _ in range(3):
        lin = linearizer(closure)
        J = lin.dense()
        lin.before_trial()
        closure()
        lin.parameters_unchanged()
        assert torch.equal(lin.dense(), J)
        lin.release()


def test_only_what_has_changed_is_copied(monkeypatch):
    copies, own = [], live.copied
    monkeypatch.setattr(live, "copied", lambda t: copies.append(t.shape) or own(t))
    model, w, _ = problem("average")
    b = rand(20, 1)
    for factor, later in ((None, []), (0.9, [(20, 1)])):
        optimizer, steps = pgdfast.LM(model.parameters()), []

        def closure(factor=factor):
            if factor is not None:
                w.mul_(factor)
            return w * (b * model(X))

        for _ in range(4):
            copies.clear()
            optimizer.step(closure)
            steps.append(list(copies))
        assert len(steps[0]) >= 2 and all(step == later for step in steps[1:]), steps


def test_a_first_change_in_a_later_step_is_refused_once():
    model, w, _ = problem("average")
    changes, calls = [False], [0]

    def closure():
        calls[0] += 1
        if changes[0]:
            w.mul_(1.0)   # as good as a change
        r = w * model(X) - 1
        return r if calls[0] % 3 != 2 else 100 * r   # the first trial of every step is rejected

    optimizer = pgdfast.LM(model.parameters(), damping=0.1)
    for _ in range(3):
        calls[0] = 0
        optimizer.step(closure)
    changes[0], calls[0] = True, 0
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="reads as a constant was changed in place .* parameters are left unchanged"):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for _ in range(2):
        calls[0] = 0
        optimizer.step(closure)
        assert optimizer.report.attempts == 2


def test_large_constants_are_not_copied(monkeypatch):
    monkeypatch.setattr(live, "_COPIED_BYTES", 100)
    model, w, closure = problem("average")
    linearizer = Linearizer(model.parameters())
    for refused in (True, False):   # then it is known which
        lin = linearizer(closure)
        step = pgdfast.solve(lin, 0.1).step
        lin.before_trial()
        closure()
        lin.parameters_unchanged()
        if refused:
            with pytest.raises(RuntimeError, match="changed in place"):
                pgdfast.solve(lin, 0.1)
        else:
            assert relative(pgdfast.solve(lin, 0.1).step, step) < 1e-12


def test_a_change_from_outside_is_noticed():
    model, w, _ = problem("average")
    for closure in (lambda: w * model(X), lambda: (w * model(X)).cumsum(0)):
        lin = pgdfast.linearize(closure, model.parameters())
        lin.gradient()
        w.mul_(2)
        with pytest.raises(RuntimeError, match="in place .* Write it out of place"):
            lin.gradient()
