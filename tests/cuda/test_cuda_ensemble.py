"""The kernel in which one block owns one model, emulated: every member against the reference of that member alone."""

import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import TIGHT, gradient, mlp, rand, reference, relative
from torch import nn

import pgdfast
from pgdfast import kernels as implementations
from pgdfast.kernels import cuda, native

pytestmark = pytest.mark.usefixtures("on_cuda")
COUNT = 5


def regression(seed, dtype):
    model, x = mlp(2, 9, 6, 1, seed=seed, dtype=dtype), rand(19, 2, seed=1, dtype=dtype)
    return model, lambda: F.mse_loss(model(x), x[:, :1].sin())


def two_outputs(seed, dtype):
    model, x = mlp(2, 7, 3, seed=seed, dtype=dtype), rand(6, 2, seed=seed, dtype=dtype)
    return model, lambda: model(x)


def pinn(seed, dtype):
    model, x = mlp(2, 40, 40, 1, seed=seed, dtype=dtype), rand(5, 2, seed=1, dtype=dtype).requires_grad_()
    edge = rand(3, 2, seed=2, dtype=dtype)

    def residuals():
        slope = gradient(model(x), x)
        return gradient(slope[:, 0].sum(), x)[:, 0] + 1, model(edge)

    return model, residuals


def softmax(seed, dtype):
    model, x = mlp(3, 5, 4, seed=seed, dtype=dtype), rand(7, 3, seed=1, dtype=dtype)
    return model, lambda: F.cross_entropy(model(x), torch.arange(7) % 4)


def gathered(seed, dtype):
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4, dtype=dtype), torch.nn.LayerNorm(4, dtype=dtype),
                                *mlp(4, 5, 1, seed=seed, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(rand(5, 4, seed=seed))
    return model, lambda: model(torch.tensor([0, 3, 1, 3, 4, 0]))


PROBLEMS = {f.__name__: f for f in (regression, two_outputs, pinn, softmax, gathered)}


def ensemble(library, make, dtype, wide=None):
    """(kernels over the members' joined constants, the members' linearizations, their references)."""
    lins, refs, all_constants = [], [], []
    for seed in range(COUNT):
        model, closure = make(seed, dtype)
        lins.append(pgdfast.linearize(closure, model.parameters()))
        refs.append(reference.linearize(closure, model.parameters()))
        all_constants.append(lins[-1]._constants)
    program = lins[0]._plan.program
    joined, layouts, shifts = [], [], []
    for k, layout in enumerate(program.layouts):
        mine = [constants[k] for constants in all_constants]
        if layout is None:
            assert len(set(mine)) == 1
            joined.append(mine[0])
            layouts.append(None)
            shifts.append(0)
            continue
        span = 1 + sum((n - 1) * s for n, s in zip(*layout, strict=True))
        together = torch.cat([c.as_strided((span,), (1,), c.storage_offset()).detach() for c in mine])
        joined.append(together)
        layouts.append((tuple(together.shape), (1,)))
        shifts.append(span)
    kernels = cuda.Kernels(replace(program, layouts=layouts), wide or dtype, library=library)
    kernels.set_members(COUNT, shifts, [0] * len(shifts))
    kernels.bind(joined)
    kernels.set_rows(lins[0].row_layout())
    return kernels, lins, refs


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", ["dual", "cg", "primal"])
def test_members_are_solved_as_alone(name, method, on_cuda):
    kernels, lins, refs = ensemble(on_cuda, PROBLEMS[name], torch.float64)
    r = torch.stack([lin.residual for lin in lins])
    mu = torch.logspace(-2, 0, COUNT, dtype=torch.float64)
    listed = [0, 2, 3, 4]
    steps, found = kernels.members_solve(method, listed, r, mu, (), None, None, TIGHT)
    assert not steps[1].any()
    for b, (status, iterations, _, gain, square, trace, slack) in zip(listed, found, strict=True):
        expected = reference.solve(refs[b], float(mu[b])).step
        assert status == "solved" and (iterations > 0) == (method == "cg")
        assert relative(steps[b], expected) < 1e-9
        assert gain == pytest.approx(float(lins[b].gradient() @ expected), rel=1e-8)
        assert square == pytest.approx(float(expected.square().sum()), rel=1e-8)
        if method == "dual":
            assert trace == pytest.approx(float(refs[b].gram().trace() / mu[b]), rel=1e-9) and slack == 0


@pytest.mark.parametrize("method", ["dual", "cg"])
def test_float32_and_float64_sums_of_float32_models(method, on_cuda):
    for wide, bound, tolerance in ((None, 1e-4, 1e-6), (torch.float64, 1e-5, 1e-9)):
        kernels, lins, refs = ensemble(on_cuda, regression, torch.float32, wide)
        r = torch.stack([lin.residual for lin in lins])
        mu = torch.full((COUNT,), 0.05, dtype=torch.float64)
        steps, found = kernels.members_solve(method, list(range(COUNT)), r, mu, (), None, None, pgdfast.CG(400, tolerance))
        assert steps.dtype == (wide or torch.float32) and {status for status, *_ in found} == {"solved"}
        for b in range(COUNT):
            assert relative(steps[b], reference.solve(refs[b], 0.05).step) < bound


def test_a_penalty_and_a_scale_run_one_by_one(on_cuda):
    kernels, lins, _ = ensemble(on_cuda, regression, torch.float64)
    r = torch.stack([lin.residual for lin in lins])
    mu = torch.full((COUNT,), 0.1, dtype=torch.float64)
    P = kernels.num_parameters
    scale, q = 1 + rand(COUNT, P).square(), rand(COUNT, P, seed=1)
    penalty = [0.01 * k for k in range(len(kernels.parameter_sizes))]
    c = torch.cat([torch.full((n,), x, dtype=torch.float64) for n, x in zip(kernels.parameter_sizes, penalty, strict=True)])
    for method, scales in (("dual", None), ("primal", scale), ("cg", scale)):
        steps, _ = kernels.members_solve(method, [1, 3], r, mu, penalty, scales, q, TIGHT)
        for b in (1, 3):
            J = lins[b].dense()
            d = 0.1 * (torch.ones(P, dtype=torch.float64) if scales is None else scales[b]) + c
            assert relative(steps[b], torch.linalg.solve(J.T @ J + d.diag(), J.T @ r[b] + q[b])) < 1e-9


def test_the_update_in_the_same_launch(on_cuda):
    kernels, lins, _ = ensemble(on_cuda, regression, torch.float64)
    r = torch.stack([lin.residual for lin in lins])
    mu, rates = torch.full((COUNT,), 0.1, dtype=torch.float64), torch.linspace(0.5, 1, COUNT, dtype=torch.float64)
    stacked = [torch.stack([lin.params[k].detach() for lin in lins]) for k in range(len(lins[0].params))]
    before = [p.clone() for p in stacked]
    version = stacked[0]._version
    steps, _ = kernels.members_solve("dual", [0, 1, 4], r, mu, (), None, None, TIGHT, update=(stacked, rates))
    moved = torch.cat([(b - p).flatten(1) for p, b in zip(stacked, before, strict=True)], 1)
    assert relative(moved, rates[:, None] * steps) < 1e-14 and stacked[0]._version > version
    assert torch.equal(stacked[0][2], before[0][2])


def test_a_member_that_fails_leaves_the_others_alone(on_cuda):
    kernels, lins, refs = ensemble(on_cuda, regression, torch.float64)
    r = torch.stack([lin.residual for lin in lins])
    r[2] = float("nan")
    mu = torch.full((COUNT,), 0.1, dtype=torch.float64)
    for method, status in (("dual", "not_positive_definite"), ("cg", "breakdown")):
        steps, found = kernels.members_solve(method, list(range(COUNT)), r, mu, (), None, None, TIGHT)
        assert [f[0] for f in found] == ["solved", "solved", status, "solved", "solved"] and not steps[2].any()
        assert relative(steps[3], reference.solve(refs[3], 0.1).step) < 1e-9


@pytest.mark.parametrize("method", ["dual", "cg"])
def test_no_result_depends_on_the_order_of_threads_or_blocks(method, on_cuda, order):
    kernels, lins, _ = ensemble(on_cuda, pinn, torch.float64)
    r = torch.stack([lin.residual for lin in lins])
    mu = torch.full((COUNT,), 0.1, dtype=torch.float64)
    found = []
    for kind in (0, 1, 2):
        order(kind)
        found.append(kernels.members_solve(method, list(range(COUNT)), r, mu, (), None, None, pgdfast.CG(30, 1e-12))[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_does_not_fit_in_shared_memory_lies_in_the_workspace(on_cuda):
    """A matrix of 110 residuals fits into the emulated 96 KB, its arenas do not."""

    def large(seed, dtype):
        model, x = mlp(1, 30, 30, 1, seed=seed, dtype=dtype), rand(108, 1, seed=1, dtype=dtype)
        return model, lambda: model(x)

    kernels, lins, refs = ensemble(on_cuda, large, torch.float64)
    r = torch.stack([lin.residual for lin in lins])
    mu = torch.full((COUNT,), 0.1, dtype=torch.float64)
    steps, _ = kernels.members_solve("dual", [0, 4], r, mu, (), None, None, TIGHT)
    assert kernels.library.ensemble_bytes(kernels.plan, 0, COUNT) > 100000
    assert relative(steps[4], reference.solve(refs[4], 0.1).step) < 1e-9


def known(library):
    """cuda.Kernels over a library, as a class: whether it serves members is asked of it."""
    class Emulated(cuda.Kernels):
        def __init__(self, program, dtype):
            super().__init__(program, dtype, library=library)

    return Emulated


@pytest.mark.parametrize("options", [
    {}, {"solver": "cg", "cg": TIGHT, "damping": 1.0}, {"damping_rule": "constant", "lr": 0.1, "scaling": "marquardt"},
], ids=["default", "cg", "marquardt"])
def test_lm_trains_an_ensemble_on_them(options, emulated, monkeypatch):
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]

    def losses_of(module):
        monkeypatch.setattr(implementations, "IMPLEMENTATIONS", {"native": module})
        torch.manual_seed(3)
        networks = pgdfast.functional_ensemble(lambda b: nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double(), 3)
        optimizer = pgdfast.LM(networks.parameters(), ensemble=3, **options)
        seen = [optimizer.step(lambda: ((networks(x) - torch.sin(3 * x)) ** 2).mean((1, 2))) for _ in range(4)]
        assert set(optimizer.report.solve_status) == {"solved"}
        return torch.stack(seen)

    on_a_gpu = types.SimpleNamespace(
        available=lambda: None, applies=lambda device, dtype: True, LIMITS="in tests", Kernels=known(emulated)
    )
    assert torch.allclose(losses_of(on_a_gpu), losses_of(native), rtol=1e-7, atol=0)
