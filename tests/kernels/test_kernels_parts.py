"""Sums over the parts of a problem: J^T J added up, K by blocks of packed factors, factors of given matrices."""

from functools import partial

import pytest
import torch
from helpers import mlp, rand, relative
from kernels.cases_parts import coupled, regression

import pgdfast
from pgdfast.kernels import native
from pgdfast.linear import Linearizer

pytestmark = pytest.mark.skipif(native._C is None, reason="the C++ core is not built")


def sliced(outputs, dtype=torch.float64, scale=0.5, width=12):
    """A closure over rows first .. last - 1 of 24 in all."""
    model, x = mlp(3, width, outputs, dtype=dtype), rand(24, 3, seed=1, dtype=dtype)
    return list(model.parameters()), lambda first, last: scale * model(x[first:last])


@pytest.mark.parametrize(("outputs", "dtype"), [(1, torch.float64), (4, torch.float64), (4, torch.float32)])
def test_normal_matrices_are_added_up(outputs, dtype):
    params, closure = sliced(outputs, dtype, width=40)
    linearizer, J = Linearizer(params), []
    H = native.normal_matrix(sum(p.numel() for p in params), dtype)
    for first, last in ((0, 10), (10, 11), (11, 24)):
        lin = linearizer(partial(closure, first, last))
        lin.scale_rows(rand(lin.num_residuals, seed=last).abs())
        _ = lin.row_layout()
        lin.kernels().add_normal(H)
        J.append(lin.dense())
    J = torch.cat(J)
    assert H.is_contiguous() and relative(native.symmetric(H), J.T @ J) < (1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("budget", [1, 3000])
@pytest.mark.parametrize("kind", ["rows", "products", "many products"])
def test_a_large_jacobian_passes_in_blocks(kind, budget, monkeypatch):
    """With rows and without, by products with J^T or with J."""
    monkeypatch.setenv("PGDFAST_PASS_BYTES", str(budget))
    params, closure = regression(1, rows=40) if kind == "rows" else coupled(9 if kind == "products" else 40)
    lin = pgdfast.linearize(closure, params)
    assert (lin.row_layout() is None) == (kind != "rows")
    kernels, M, P = lin.kernels(), lin.num_residuals, lin.num_parameters
    H = native.normal_matrix(P, torch.float64)
    H[:P, :P] = torch.eye(P)
    kernels.add_normal(H)
    J = kernels.dense()
    assert (P < M) == (kind == "many products") or kind == "rows"
    assert relative(native.symmetric(H), J.T @ J + torch.eye(P)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("n", [1, 30, 250])
def test_factor_of_a_given_matrix(n, dtype):
    A, b = rand(n, n + 3, seed=n), rand(n, seed=2, dtype=dtype)
    H = native.normal_matrix(n, dtype)
    H[:n, :n] = (A @ A.T).triu().to(dtype)
    before, full = H.clone(), native.symmetric(H).double()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-3
    for added in (0.7, torch.linspace(0.5, 2, n, dtype=dtype)):
        factor, trace = native.factor(H, added)
        d = torch.as_tensor(added, dtype=torch.float64).expand(n)
        assert relative(factor.solve(b), torch.linalg.solve(full + d.diag(), b.double())) < tolerance
        assert abs(trace - float((full.diagonal() / d).sum())) < 1e-5 * trace
        assert factor.order == n and not factor.is_dual
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    factor, _ = native.factor(H, 0.7, order.tolist())
    right = torch.linalg.solve(full[order][:, order] + 0.7 * torch.eye(n, dtype=torch.float64), b.double())
    assert factor.is_dual and relative(factor.solve(b), right) < tolerance
    with pytest.raises(ValueError, match="no dual vector"):
        _ = factor.dual_vector
    factor.dual_vector = b
    assert torch.equal(factor.dual_vector, b) and torch.equal(H, before)
    held, trace = native.factor(H, -1e9)
    assert held is None and trace < 0
    with pytest.raises(IndexError, match="every row of the matrix once"):
        native.factor(H, 0.7, [n] * n)
