"""Term weights: what they equalise, computed by autograd; the step they make; resuming; what is refused."""

import copy
import functools
import math

import pytest
import torch
from helpers import (
    EVERYWHERE,
    apart,
    counted,
    flat,
    memory_of,
    networks_of,
    nudged,
    pinn,
    rand,
    resampled,
    seed_all,
    snapshot,
    stack_of,
    through_a_file,
)

import pgdfast
from pgdfast import Balance

BY = ("trace", "gradient")


def weights_of(optimizer, b=0):
    """Those of the next step."""
    return memory_of(optimizer)["members"][b]["weights"]


def by_autograd(by, residuals, params):
    """tr(J_k J_k^T) or ||J_k^T r_k|| of every term, row by row."""
    found = []
    for r in residuals:
        rows = [torch.autograd.grad(e, params, retain_graph=True, materialize_grads=True) for e in r.reshape(-1)]
        J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        found.append(float(J.square().sum()) if by == "trace" else float((J.T @ r.detach().reshape(-1)).norm()))
    return found


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("by", BY)
def test_weights_equalise_what_autograd_finds(by, backend):
    params, residuals = pinn()
    optimizer = pgdfast.LM(params, balance=Balance(by, every=2, momentum=0.25), backend=backend, solver="dual")
    expected = None

    def closure():
        equation, edge = residuals()
        return [equation, 10 * edge[:, None]]

    for step in range(6):
        found = by_autograd(by, closure(), params)
        terms = [0.5 * float(r.detach().square().sum()) for r in closure()]
        used = expected or [1.0, 1.0]
        loss = optimizer.step(closure)
        assert optimizer.report.weights == pytest.approx(used, rel=1e-9)
        assert optimizer.report.terms == pytest.approx(terms, rel=1e-9)
        assert float(loss) == optimizer.report.loss == pytest.approx(sum(w * t for w, t in zip(used, terms, strict=True)))
        if step % 2 == 0:
            new = [sum(found) / 2 / q for q in found]
            assert sum(w * q for w, q in zip(new, found, strict=True)) == pytest.approx(sum(found))
            expected = new if step == 0 else [a**0.25 * b**0.75 for a, b in zip(used, new, strict=True)]
        assert weights_of(optimizer) == pytest.approx(expected, rel=1e-9)
    assert abs(math.log(expected[0] / expected[1])) > 0.5, "the terms were balanced already"


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("shape", [(3, 6), (9, 4)])
@pytest.mark.parametrize("solver", ["primal", "dual", "eigh"])
def test_traces_beside_direct_solvers_are_exact(solver, shape, backend):
    J, w = rand(*shape), rand(shape[1], seed=1).requires_grad_()
    optimizer = pgdfast.LM([w], balance="trace", solver=solver, backend=backend)
    optimizer.step(lambda: (J[:2] @ w, J[2:] @ w - 1))
    traces = [float(J[:2].square().sum()), float(J[2:].square().sum())]
    assert weights_of(optimizer) == pytest.approx([sum(traces) / 2 / t for t in traces], rel=1e-9)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("solver", ["lsmr", "cg"])
def test_traces_by_products_are_exact_where_rows_do_not_meet(solver, backend):
    w = rand(6).requires_grad_()
    factors = rand(6, seed=1)
    optimizer = pgdfast.LM([w], balance="trace", solver=solver, backend=backend)
    optimizer.step(lambda: (factors[:2] * w[:2], (factors[2:] * w[2:])[None]))
    traces = [float(factors[:2].square().sum()), float(factors[2:].square().sum())]
    assert weights_of(optimizer) == pytest.approx([sum(traces) / 2 / t for t in traces], rel=1e-9)


def test_estimated_traces_are_near_and_the_same_in_every_run():
    found = []
    for solver in ("cg", "cg", "dual"):
        params, closure = pinn()
        optimizer = pgdfast.LM(params, balance="trace", solver=solver)
        optimizer.step(closure)
        found.append(weights_of(optimizer))
    assert found[0] == found[1] != found[2]
    assert [math.log(a / b) for a, b in zip(found[0], found[2], strict=True)] == pytest.approx([0, 0], abs=1)


OPTIONS = {
    "plain": {},
    "delayed, chord": dict(damping_rule="delayed", acceleration="chord"),
    "geodesic, marquardt": dict(acceleration="geodesic", scaling="marquardt"),
    "sweep": dict(damping_rule="sweep"),
    "armijo": dict(line_search="armijo"),
    "momentum": dict(momentum=0.5, norm_constraint=0.1),
    "cg": dict(solver="cg", cg=pgdfast.CG(200, 1e-12, truncate=True)),
}


@pytest.mark.parametrize(("name", "backend"), [
    *[(name, "native") for name in OPTIONS], *[(name, each) for name in ("plain", "delayed, chord") for each in EVERYWHERE[1:]],
])
@pytest.mark.parametrize("by", BY)
def test_a_step_is_that_of_the_closure_weighted_by_hand(by, name, backend):
    params, closure = pinn()
    options = OPTIONS[name] | dict(backend=backend)
    optimizer = pgdfast.LM(params, balance=Balance(by, every=1), **options)
    by_hand = pgdfast.LM(params, **options)
    for step in range(4):
        before, state = snapshot(params), copy.deepcopy(optimizer.state_dict())
        loss = optimizer.step(closure)
        after, report = snapshot(params), optimizer.report
        with torch.no_grad():
            for p, q in zip(params, before, strict=True):
                p.copy_(q)
        for values in state["state"].values():
            for member in values.get("members", ()):
                assert tuple(member.pop("weights", None) or (1.0, 1.0)) == report.weights
        if step:
            by_hand.load_state_dict(state)
        roots = [torch.tensor(w, dtype=torch.float64).sqrt() for w in report.weights]
        same = by_hand.step(lambda roots=roots: tuple(r * root for r, root in zip(closure(), roots, strict=True)))
        assert torch.equal(flat(params), flat(after)) and float(same) == float(loss)
        assert (by_hand.report.loss_after, by_hand.report.damping) == (report.loss_after, report.damping)


@pytest.mark.parametrize("options", [{}, dict(damping_rule="delayed", acceleration="chord"), dict(damping_rule="sweep")])
@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
@pytest.mark.parametrize("made", [lambda c: c, functools.partial, lambda c: counted(c)[0]])
def test_one_term_keeps_its_weight_and_draws_what_it_would_draw_alone(made, source, options):
    ends = []
    for balance in (None, "trace"):
        seed_all()
        params, closure, seen = resampled(source)
        optimizer = pgdfast.LM(params, balance=balance, **options)
        for _ in range(4):
            optimizer.step(made(lambda closure=closure: (closure(),)))
        ends.append((flat(params), torch.stack(seen)))
    assert optimizer.report.weights == (1.0,) and len(optimizer.report.terms) == 1
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("by", BY)
def test_a_resumed_run_goes_on_bit_for_bit(by):
    def optimizer():
        return pgdfast.LM(params, balance=Balance(by, every=3), solver="cg", damping_rule="delayed", acceleration="chord")

    params, closure = pinn()
    straight = optimizer()
    for _ in range(4):
        straight.step(closure)
    before, state = snapshot(params), through_a_file(straight.state_dict())
    for _ in range(4):
        straight.step(closure)
    end, weights = flat(params), weights_of(straight)
    with torch.no_grad():
        for p, q in zip(params, before, strict=True):
            p.copy_(q)
    resumed = optimizer()
    resumed.load_state_dict(state)
    for _ in range(4):
        resumed.step(closure)
    assert torch.equal(flat(params), end) and tuple(weights_of(resumed)) == tuple(weights)
    with pytest.raises(ValueError, match="balance=None, which would minimize another loss"):
        pgdfast.LM(params, damping_rule="delayed").load_state_dict(state)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("by", BY)
def test_members_are_balanced_as_they_would_be_alone(by, backend):
    x, edge = rand(10, 1, seed=3), rand(4, 1, seed=4)
    networks, alone, twins = stack_of(3), networks_of(3), [nudged(m) for m in networks_of(3)]
    with torch.no_grad():
        next(iter(networks.parameters()))[1] = math.nan
    options = dict(balance=Balance(by, every=2, momentum=0.5), backend=backend, solver="dual", damping_rule="delayed")
    optimizer = pgdfast.LM(networks.parameters(), ensemble=3, **options)
    own, others = ([pgdfast.LM(m.parameters(), **options) for m in each] for each in (alone, twins))
    for _ in range(4):
        optimizer.step(lambda: (networks(x) - torch.sin(3 * x), 5 * networks(edge)))
        for b in (0, 2):
            for each, lm in ((alone, own), (twins, others)):
                lm[b].step(lambda m=each[b]: (m(x) - torch.sin(3 * x), 5 * m(edge)))
            bound = max(1e-10, 100 * apart(alone[b], twins[b]))
            assert apart(networks.member(b), alone[b]) < bound < 1e-6
            assert optimizer.report[b].weights == pytest.approx(own[b].report.weights, rel=1e-6)
            assert optimizer.report[b].terms == pytest.approx(own[b].report.terms, rel=1e-6)
    assert optimizer.report[1].weights == () and own[0].report.weights != own[2].report.weights


def test_terms_that_ask_for_nothing_keep_their_weight():
    balance = Balance(momentum=0.5, largest=100.0)
    assert balance.updated((1.0, 2.0, 3.0), [4.0, 0.0, 1.0], True) == (2.5 / 4, 2.0, 2.5)
    assert balance.updated((1.0, 4.0), [2.0, math.nan], False) == (1.0, 4.0)
    assert balance.updated((1.0, 1.0), [1.0, 1e-30], True) == (0.5, 100.0)
    assert balance.updated((4.0, 1.0), [1.0, 1.0], False) == pytest.approx((2.0, 1.0))


@pytest.mark.parametrize(("returned", "got"), [
    (lambda w: w.square().sum(), r"one tensor of shape \(\)"), (lambda w: w, r"one tensor of shape \(5,\)"),
])
def test_closures_without_terms_are_refused(returned, got):
    w = rand(5).requires_grad_()
    before = w.detach().clone()
    with pytest.raises(ValueError, match=f"balance needs a closure that returns several residual tensors.*{got}"):
        pgdfast.LM([w], balance="trace").step(lambda: returned(w))
    assert torch.equal(w.detach(), before)


def test_refusals():
    w = rand(5).requires_grad_()
    optimizer = pgdfast.LM([w], balance="trace")
    optimizer.step(lambda: (w[:2], w[2:]))
    with pytest.raises(ValueError, match="returned 3 residual tensors and 2 in earlier steps"):
        optimizer.step(lambda: (w[:2], w[2:4], w[4:]))
    with pytest.raises(ValueError, match="closure returned float"):
        optimizer.step(lambda: (w[:2], 1.0))
    with pytest.raises(ValueError, match="a tuple with a scalar in it"):
        optimizer.step(lambda: (w[:2], w.sum()))
    with pytest.raises(ValueError, match="balance does not work in it"):
        pgdfast.CapturedStep(optimizer, lambda: (w[:2], w[2:]))
    with pytest.raises(ValueError, match="first_order would minimize them unweighted"):
        pgdfast.Hybrid(optimizer, torch.optim.Adam([w]))
    with pytest.raises(ValueError, match="balance is 'ntk'"):
        pgdfast.LM([w], balance="ntk")
    for wrong in (dict(by="loss"), dict(every=0), dict(every=2.0), dict(momentum=1.0), dict(largest=1.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Balance(**wrong)
