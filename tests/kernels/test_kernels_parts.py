"""Sums over the parts of a problem: J^T J added up, K by blocks of packed factors, factors of given matrices."""

from functools import partial

import pytest
import torch
from helpers import gradient, mlp, parameters, rand, relative
from kernels.cases_parts import coupled, regression

import pgdfast
from pgdfast import pde
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


# --- K by blocks -------------------------------------------------------------------------------------------------------------


def laplacian(u, x):
    slope = gradient(u, x)
    return sum(gradient(slope[:, d], x)[:, d] for d in range(x.shape[1]))


def points(n, seed=1):
    return rand(n, 2, seed=seed).requires_grad_()


def equations(model, inside, edge):
    x = points(inside)

    def closure():
        u = model(x)
        return torch.stack([laplacian(u[:, k], x) for k in range(u.shape[1])], 1), model(rand(edge, 2, seed=2))

    return closure


def regressions(outputs, width, *rows, dtype=torch.float64):
    params, closure = sliced(outputs, dtype, width=width)
    starts = [sum(rows[:k]) for k in range(len(rows))]
    return params, [partial(closure, first, first + n) for first, n in zip(starts, rows, strict=True)]


def pinns(outputs, width, *sizes):
    """Double backward: weights along and against their rows."""
    model = mlp(2, width, width, outputs)
    return list(model.parameters()), [equations(model, *n) for n in sizes]


def taylor(*sizes):
    model = mlp(2, 24, 24, 1)

    def closure(n, edge):
        u, _, bend = pde.laplacian(model, rand(n, 2, seed=n))
        return bend + u**2, model(rand(edge, 2, seed=2))

    return list(model.parameters()), [partial(closure, *n) for n in sizes]


def two_structures(outputs, width):
    """One part uses weights in both roles, one in one, one not all of them, one with several outputs of some rows only."""
    model = mlp(2, width, width, outputs)
    some, x = torch.tensor([7, 5, 6, 1]), rand(9, 2, seed=5)

    def few():
        return torch.tanh(rand(5, width, seed=4) @ model[2].weight.T + model[2].bias) @ model[4].weight.T

    def shared():
        u = model(x)
        return u[some, 0] * u[some, -1], u[:6, 0]

    closures = [equations(model, 11, 3), lambda: model(rand(20, 2, seed=3)), few, shared, lambda: model(rand(1, 2, seed=8))]
    return list(model.parameters()), closures


def other_windows():
    """A part of a weight or a bias in one part, all of it or another part of it in another; biases of other weights."""
    W, V, b = parameters((20, 16), (20, 16), (40,))
    x = rand(30, 16, seed=1)

    def mixed(z, outputs=1):
        return torch.tanh(z) @ rand(z.shape[1], outputs, seed=2)

    return [W, V, b], [
        lambda: mixed(x[:9] @ W.T + b[:20]),
        lambda: mixed(x[:8] @ W.T + b[20:], 2),
        lambda: mixed(x[:7, :5] @ W[:, :5].T),
        lambda: mixed(x[:6] @ V.T + b[:20]),
        lambda: mixed(x[:5, :10] @ W[:10, 3:13]),
        lambda: mixed(x[:2] @ W.T + b[20:]),
        lambda: (mixed(x[:4] @ W.T + b[:20]), mixed(x[5:8] @ W.T + b[20:])),
    ]


def rows_of_all_kinds():
    """Explicit rows: a matrix with a narrow side, a stack, an embedding, a number; folded or not by how they are used."""
    wide, stack, table, number = parameters((40, 3), (2, 3, 3), (8, 3), (1,))

    def closure(n, outputs):
        h = torch.tanh((rand(n, 3, seed=n) + table[torch.arange(n) % 8]) @ stack[0] @ stack[1]) * number
        return torch.tanh(h @ wide.T) @ rand(40, outputs, seed=6)

    return [wide, stack, table, number], [
        partial(closure, 9, 2), partial(closure, 31, 1), partial(closure, 2, 2), lambda: rand(5, 40, seed=3) @ wide,
        lambda: (wide * number)[:7, 0],
    ]


BLOCKS = {
    "regression": lambda: regressions(1, 20, 9, 12, 3),
    "several outputs": lambda: regressions(4, 20, 9, 12, 3),
    "several outputs, wide": lambda: regressions(3, 60, 1, 21, 2),
    "float32": lambda: regressions(4, 40, 9, 12, 3, dtype=torch.float32),
    "pinn": lambda: pinns(1, 24, (7, 3), (20, 4), (1, 1)),
    "two equations": lambda: pinns(2, 24, (7, 3), (20, 4)),
    "narrow pinn": lambda: pinns(1, 5, (7, 3), (20, 4)),
    "taylor": lambda: taylor((17, 5), (30, 2)),
    "two structures": lambda: two_structures(1, 24),
    "two structures, several outputs": lambda: two_structures(3, 24),
    "two structures, narrow": lambda: two_structures(2, 4),
    "other windows": other_windows,
    "rows of all kinds": rows_of_all_kinds,
}


def blocks_of(parts, dtype, weights, chunk):
    """K of all parts from rows `chunk` at a time, and where every residual stands in it; nothing but the blocks is written."""
    counts = [p.num_residuals for p, _ in parts]
    starts = [sum(counts[:k]) for k in range(len(counts) + 1)]
    K = native.gram_matrix(starts[-1], dtype).fill_(torch.nan)
    for i in reversed(range(len(parts))):
        for j in reversed(range(i, len(parts))):
            for first in range(0, counts[i], chunk):
                last = min(first + chunk, counts[i])
                native.gram_rows(parts[i][0], parts[j][0], first, last, K, starts[i] + first, starts[j], weights)
    assert K[-1].isnan().all() and K[:, starts[-1] :].isnan().all()
    order = [start + k for start, (_, order) in zip(starts, parts, strict=False) for k in order]
    return K, order


@pytest.mark.parametrize("chunk", [1000, 5])
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("name", BLOCKS)
def test_gram_by_blocks_of_packed_factors(name, budget, chunk, monkeypatch):
    """Of parts whose structures, sizes and scales differ; once more from what another process would get."""
    params, closures = BLOCKS[name]()
    linearizer, J, parts = Linearizer(params), [], []
    for k, closure in enumerate(closures):
        lin = linearizer(closure)
        lin.scale_rows(rand(lin.num_residuals, seed=k).abs() + 0.1)
        J.append(lin.dense())
        _ = lin.row_layout()
        kernels = lin.kernels()
        assert kernels.packs
        parts.append((kernels.pack(), kernels.gram_order))
        lin.release()
    if budget is not None:
        monkeypatch.setenv("PGDFAST_PASS_BYTES", str(budget))
    J = torch.cat(J)
    tolerance = 1e-13 if J.dtype == torch.float64 else 1e-5
    weights = [1.0 + k for k in range(len(params))]
    W = torch.cat([torch.full((p.numel(),), w, dtype=J.dtype) for p, w in zip(params, weights, strict=True)])
    for given, right in ((None, J @ J.T), (weights, J * W @ J.T)):
        K, order = blocks_of(parts, J.dtype, given, chunk)
        assert relative(native.symmetric(K)[order][:, order], right) < tolerance
    again = [(native.packed(p.header(), p.tensor().clone()), order) for p, order in parts]
    assert torch.equal(native.symmetric(blocks_of(again, J.dtype, given, chunk)[0]), native.symmetric(K))
    a, b = parts[0][0], parts[-1][0]
    block, turned = (torch.empty(x.num_residuals, y.num_residuals, dtype=J.dtype) for x, y in ((a, b), (b, a)))
    native.gram_rows(a, b, 0, len(block), block, 0, 0)
    native.gram_rows(b, a, 0, len(turned), turned, 0, 0)
    assert relative(turned.T, block) < tolerance
    factor, _ = native.factor(K, 0.5, order)
    r = rand(len(J), seed=5, dtype=J.dtype)
    assert relative(factor.solve(r), torch.linalg.solve(right + 0.5 * torch.eye(len(J), dtype=J.dtype), r)) < 1e3 * tolerance


def test_what_does_not_belong_together_is_refused():
    packed = []
    for outputs, dtype in ((2, torch.float64), (3, torch.float64), (2, torch.float32)):
        lin = Linearizer((case := regression(outputs, dtype))[0])(case[1])
        assert not lin.kernels().packs
        with pytest.raises(ValueError, match="pack needs a row layout"):
            lin.kernels().pack()
        _ = lin.row_layout()
        packed.append(lin.kernels().pack())
    a, b, narrow = packed
    K, count = torch.zeros(18, 30, dtype=torch.float64), a.num_residuals
    for other, error, message in ((b, RuntimeError, "of other parameters"), (narrow, ValueError, "in one dtype")):
        with pytest.raises(error, match=message):
            native.gram_rows(a, other, 0, count, K, 0, 0)
    for first, last, row, column in ((0, count + 1, 0, 0), (-1, 2, 0, 0), (3, 2, 0, 0), (0, count, 1, 0), (0, count, 0, 13)):
        with pytest.raises(IndexError):
            native.gram_rows(a, a, first, last, K, row, column)
    header, memory = a.header(), a.tensor()
    assert memory.data_ptr() == a.tensor().data_ptr()
    with pytest.raises(RuntimeError, match=r"tiles of \d+ rows; this process has tiles of \d+. Let all"):
        native.packed([*header[:2], header[2] // 2, *header[3:]], memory)
    for wrong in (header[:-1], [*header, 0], [7, *header[1:]], [], [*header[:-1], header[-1] + 10**9]):
        with pytest.raises(RuntimeError, match="pgdfast: "):
            native.packed(wrong, memory)
    with pytest.raises(RuntimeError, match="no header"):
        native.packed(header, memory[1:])
