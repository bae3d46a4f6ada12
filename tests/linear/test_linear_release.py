"""What a linearization holds, how it lets go, and what an interruption leaves behind."""

import gc

import pytest
import torch
import torch.nn.functional as F
from helpers import fit, forget_rules, mlp, rand, relative
from torch.multiprocessing.reductions import StorageWeakRef

import pgdfast
from pgdfast.backend import Reference
from pgdfast.linear import EnsembleLinearizer, Linearizer, protocol


def watched(backend="native", rule=True):
    """A linearizer, a closure, and the storages of what its tapes save."""
    model, x, seen = mlp(2, 6, 1), rand(9, 2, seed=1), []

    def closure():
        hidden = torch.tanh(model[0](x))
        seen.append(StorageWeakRef(hidden.untyped_storage()))
        z = model[2](hidden)
        return F.mse_loss(z, torch.ones_like(z)) if rule else z * torch.special.i0e(z)

    return Linearizer(model.parameters(), backend), closure, seen


@pytest.fixture(autouse=True)
def no_rule(monkeypatch):
    forget_rules(monkeypatch, "SpecialI0EBackward0")


@pytest.fixture(autouse=True)
def no_collector():
    """What is let go of goes at once, not when the collector comes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("rule", [True, False], ids=["tape", "double backward"])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
def test_release_lets_go_of_the_tape(backend, rule):
    linearizer, closure, seen = watched(backend, rule)
    for _ in range(3):
        lin = linearizer(closure)
        solution = pgdfast.solve(lin, 0.1)
        pgdfast.solve(lin.widened(), 0.1)
        assert not seen[-1].expired()
        step, norm = solution.step.clone(), float(lin.residual.norm())
        lin.release()
        assert seen[-1].expired()
        lin.release()   # once more changes nothing
        assert torch.equal(solution.step, step) and float(lin.residual.norm()) == norm and lin.loss.isfinite()
        for product in (lambda: lin.vjp(lin.residual), lin.dense, lambda: solution.solve_with_same_factor(lin.residual),  # noqa: B023
                        lambda: pgdfast.solve(lin, 1.0), lambda: lin.widened().gradient()):  # noqa: B023
            with pytest.raises(RuntimeError, match="released at the end of its step, and its tape is gone; linearize again"):
                product()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_tape_goes_with_its_last_holder(backend):
    linearizer, closure, seen = watched(backend)
    lin = linearizer(closure)
    pgdfast.solve(lin, 0.1, wide=True)
    del lin
    assert seen[-1].expired()
    wide = linearizer(closure).widened()   # outlives the one that it was made from
    assert wide.gradient().isfinite().all()
    first = linearizer(closure)
    expected = first.gradient()
    second = linearizer(closure)   # takes the kernels over
    assert torch.equal(second.gradient(), expected)
    second.release()
    assert torch.equal(first.gradient(), expected)   # binds them anew


def test_an_ensemble_releases():
    weights = [rand(3, 4, 2, seed=1).requires_grad_()]
    x, seen = rand(5, 2, seed=2), []

    def closure():
        hidden = torch.tanh(torch.einsum("ni,bhi->bnh", x, weights[0]))
        seen.append(StorageWeakRef(hidden.untyped_storage()))
        return hidden.sum(2)

    linearizer = EnsembleLinearizer(weights, 3)
    lin = linearizer(closure)
    lin.member(1).gradient()
    lin.release()
    assert seen[-1].expired()
    with pytest.raises(RuntimeError, match="released"):
        lin.member(1).gradient()
    lin = linearizer(closure)
    lin.member(2).dense()
    del lin
    assert seen[-1].expired()


@pytest.mark.parametrize("interrupted", ["set_rows", "bind"])
def test_an_interruption_leaves_no_plan_half_set(interrupted, monkeypatch):
    """Whether the kernels have done their part or not: the next solve does all of it."""
    for after in (False, True):
        params, closure = fit()
        lin = pgdfast.linearize(closure, params, backend="native")
        kernels, expected = lin._plan.kernels, pgdfast.solve(pgdfast.linearize(closure, params), 0.1, solver="dual").step
        own = getattr(kernels, interrupted)

        def raising(given, own=own, after=after):
            if after:
                own(given)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(kernels, interrupted, raising)
            with pytest.raises(KeyboardInterrupt):
                pgdfast.solve(lin, 0.1, solver="dual")
        assert torch.equal(pgdfast.solve(lin, 0.1, solver="dual").step, expected)


def test_asking_changes_nothing():
    """Attributes do not build or bind; `kernels` and `row_layout` say that they do."""
    params, closure = fit()
    lin = pgdfast.linearize(closure, params, backend="native")
    plan = lin._plan
    _ = lin.penalty, lin.penalty_gradient, lin.sync_reason, lin.has_squares_only, lin.residuals_need_tape
    assert plan.bound is None and plan.layout is not None and not isinstance(plan.layout, protocol.RowLayout)
    assert lin.kernels() is plan.kernels and plan.bound is not None
    assert lin.row_layout() is plan.layout and lin.row_layout().num_rows > 0


@pytest.mark.filterwarnings("ignore:pgdfast. no tape rule")
def test_every_linearization_has_what_the_protocol_names():
    params, closure = fit()
    tape = pgdfast.linearize(closure, params)
    fallback = pgdfast.linearize(lambda: torch.special.i0e(torch.stack([p.sum() for p in params])), params)
    weights = [rand(3, 4, seed=1).requires_grad_()]
    member = EnsembleLinearizer(weights, 3)(lambda: torch.sin(weights[0])).member(1)
    for lin in (tape, tape.widened(), fallback, member, member.widened()):
        assert isinstance(lin, protocol.SolvableLinearization)
    reference = Reference().linearize(closure, params)
    assert isinstance(reference, protocol.Linearization)
    assert relative(reference.vjp(reference.residual), tape.gradient()) < 1e-10
    ensemble = EnsembleLinearizer(weights, 3)(lambda: torch.sin(weights[0]))
    names = {*dir(protocol.Linearization), *protocol.Linearization.__annotations__} - {"ggn", "ggns", "gradient", "gram"}
    assert not [name for name in names if not name.startswith("_") and not hasattr(ensemble, name)]
