"""Kernels of diag(row_scale) J, by every implementation, against the scaled rows of the plain J."""

import pytest
import torch
from helpers import forget_rules, mlp, rand, relative
from kernels.cases_parts import chained, coupled, pinn, regression

import pgdfast
from pgdfast.kernels import native, scaled
from pgdfast.linear import Linearizer
from pgdfast.linear.chained import Chained

pytestmark = pytest.mark.skipif(native._C is None, reason="the C++ core is not built")


CASES = {
    "one output": lambda: regression(1),
    "several outputs": lambda: regression(3),
    "float32": lambda: regression(3, torch.float32),
    "pinn": pinn,
    "no rows": coupled,
    "no rows, few parameters": lambda: coupled(40),
    "chain": chained,
    "double backward": lambda: regression(2),   # its operations are made unknown
}


def scale_of(lin, kind, dtype=torch.float64):
    scale = rand(lin.num_residuals, seed=7).abs() + 0.3
    return (torch.full_like(scale, 1.7) if kind == "uniform" else scale).to(dtype)


def check(lin, J, tolerance):
    """Everything that the kernels of a linearization give is of this J."""
    kernels, r = lin.kernels(), lin.residual
    v, u = rand(J.shape[1], seed=3, dtype=lin.dtype), rand(len(J), seed=4, dtype=lin.dtype)
    J = J.to(lin.dtype)
    K, H = J @ J.T, J.T @ J

    def close(a, b):
        assert relative(a, b) < tolerance

    close(lin.jvp(v), J @ v)
    close(lin.vjp(u), J.T @ u)
    close(lin.dense(), J)
    close(lin.gram(), K)
    close(lin.gradient(), J.T @ r)
    close(lin.diagonal(), H.diagonal())
    rows, kernels = lin.row_layout(), lin.kernels()
    if kernels.batches:
        U = rand(6, len(J), seed=5, dtype=lin.dtype)
        close(kernels.vjp(U), U @ J)
        close(kernels.vjp(U[:2]), U[:2] @ J)
    if kernels.has_columns and rows is not None:
        size = lin.params[0].numel()
        close(kernels.columns([0]), J[:, :size])
    if not kernels.has_direct and (kernels.fused or kernels.block_bytes is not None):
        close(kernels.normal(), H)
    if not kernels.has_direct and kernels.fused and rows is not None:
        weights = [1.0 + k for k in range(len(lin.params))]
        W = torch.cat([torch.full((p.numel(),), w, dtype=lin.dtype) for p, w in zip(lin.params, weights, strict=True)])
        close(kernels.gram(weights), J * W @ J.T)
        close(kernels.gram(), K)
    right = torch.linalg.solve(H.double() + 0.1 * torch.eye(len(H)), (J.T @ r).double())
    cg = pgdfast.CG(max_iterations=1000, tolerance=1e-12 if lin.dtype == torch.float64 else 1e-5)
    for solver in ("dual", "primal", "cg", "lsmr"):
        assert relative(pgdfast.solve(lin, 0.1, solver=solver, cg=cg).step, right) < 1e4 * tolerance
    several = [s.step for s in pgdfast.solve(lin, [0.1, 1.0], solver="cg", cg=cg)]
    assert relative(several[0], right) < 1e4 * tolerance


@pytest.mark.filterwarnings("ignore:.*no tape rule")
@pytest.mark.parametrize("kind", ["uniform", "mixed"])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_every_form_is_of_the_scaled_rows(name, backend, kind, monkeypatch):
    if name == "double backward":
        forget_rules(monkeypatch, "TanhBackward0")
    params, closure = CASES[name]()
    lin = Linearizer(params, backend)(closure)
    J, r = lin.dense().clone(), lin.residual.clone()
    assert (lin.row_layout() is None) == (name.startswith("no rows") or name == "double backward")
    assert isinstance(lin.kernels(), Chained) == (name == "chain")
    scale = scale_of(lin, kind)
    lin.scale_rows(scale)
    J, r = scale.to(r.dtype)[:, None] * J, scale.to(r.dtype) * r
    assert torch.equal(lin.residual, r)
    narrow = lin.dtype == torch.float32
    check(lin, J, 2e-5 if narrow else 1e-12)
    assert relative(lin.residual_at(closure)[1], r) < 1e-6
    if narrow:
        wide = lin.widened()
        assert wide.residual.dtype == torch.float64
        check(wide, wide.dense(), 1e-12)
        assert relative(wide.dense(), J) < 1e-6
    lin.scale_rows(torch.ones_like(scale))   # in place of the other
    assert relative(lin.dense(), J / scale.to(r.dtype)[:, None]) < 1e-6


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", ["several outputs", "chain", "float32"])
def test_linearizations_of_one_plan_keep_their_own_scales(name, backend):
    """With other constants, other scales, none, and in two precisions, asked in turn."""
    params, closure = CASES[name]()
    linearizer = Linearizer(params, backend)
    lins = [linearizer(closure) for _ in range(3)]
    if backend == "native":
        assert lins[0]._plan is lins[1]._plan is lins[2]._plan
    J = lins[0].dense().clone()
    scales = [scale_of(lins[0], "mixed"), torch.linspace(1, 2, len(J), dtype=torch.float64), torch.ones(len(J))]
    for lin, scale in zip(lins[:2], scales, strict=False):
        lin.scale_rows(scale)
    v = rand(J.shape[1], seed=3, dtype=J.dtype)
    for _ in range(2):
        for lin, scale in zip(lins, scales, strict=True):
            scaled_J = scale.to(J.dtype)[:, None] * J
            assert relative(lin.jvp(v), scaled_J @ v) < 1e-5
            assert relative(lin.gram(), scaled_J @ scaled_J.T) < 1e-5
            assert relative(lin.widened().jvp(v.double()), scaled_J @ v) < 1e-5
    lins[1].release()
    lins[0].scale_rows(scales[1])
    assert relative(lins[0].jvp(v), scales[1].to(J.dtype)[:, None] * J @ v) < 1e-5
    assert relative(lins[2].jvp(v), J @ v) < 1e-5


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_a_float32_step_is_refined_with_the_same_scale(solver, backend):
    """An ill-conditioned one, beyond the order that is factored in float64."""
    params, closure = regression(1, torch.float32, rows=230) if solver == "dual" else wide_regression()
    lin = Linearizer(params, backend)(closure)
    J, r, scale = lin.widened().dense(), lin.residual.double(), scale_of(lin, "mixed")
    J, r = scale[:, None] * J, scale * r
    lin.scale_rows(scale)
    found = pgdfast.solve(lin, 1e-4, solver=solver)
    right = torch.linalg.solve(J.T @ J + 1e-4 * torch.eye(J.shape[1], dtype=J.dtype), J.T @ r)
    assert relative(found.step, right) < 1e-4


def wide_regression():
    model, x = mlp(3, 50, 2, dtype=torch.float32), rand(300, 3, seed=1, dtype=torch.float32)
    return list(model.parameters()), lambda: model(x)


def test_a_wrapper_stands_only_where_kernels_do_not_scale():
    params, closure = regression(2)
    for backend, wrapped in (("native", False), ("torch", True)):
        lin = Linearizer(params, backend)(closure)
        lin.scale_rows(scale_of(lin, "mixed"))
        assert isinstance(lin.kernels(), scaled.RowScaled) == wrapped


def test_a_scale_of_another_size_is_refused():
    params, closure = regression(2)
    lin = Linearizer(params)(closure)
    with pytest.raises(ValueError, match=r"row_scale has shape \(3,\); it must have one factor for each of the 18"):
        lin.scale_rows(torch.ones(3))
