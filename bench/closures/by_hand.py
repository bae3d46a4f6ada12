"""The damped step as a user writes it in ten lines of torch.func: J, J^T H J or J J^T, Cholesky."""

from __future__ import annotations

import torch
from torch.func import functional_call, hessian, jacrev, vmap

from .oracle import flat, parts


class Held(torch.nn.Module):
    """The modules of a problem as one, to be called with other parameters; returns a vector twice, for `has_aux`."""

    def __init__(self, modules, forward):
        super().__init__()
        self.parts, self._forward = torch.nn.ModuleList(modules), forward

    def forward(self, *arguments):
        z = flat(parts(self._forward(*arguments)))
        return z, z


def ways(problem) -> dict:
    """{name: function of nothing that gives (J, z)}; some may not run on a problem, or give another's J."""
    found = {"jacrev": _at_once(problem), "rows": _row_by_row(problem)}
    return {"vmap(jacrev)": _per_sample(problem)} | found if problem.samples else found


def _named(module) -> dict:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def _matrix(J: dict) -> torch.Tensor:
    """Jacobians of a vector by parameter, as one matrix."""
    return torch.cat([part.reshape(len(part), -1) for part in J.values()], 1)


def _per_sample(problem):
    module, data = Held(problem.modules, lambda rows, *row: rows(*row)), problem.maker.data

    def of():
        theta, pieces, values = _named(module), [], []
        for rows, names in problem.samples:
            sample = jacrev(lambda t, *row, rows=rows: functional_call(module, t, (rows, *row)), has_aux=True)
            J, z = vmap(sample, (None, *[0] * len(names)))(theta, *[getattr(data, name) for name in names])
            pieces.append(_matrix({name: part.flatten(0, 1) for name, part in J.items()}))
            values.append(z.flatten())
        return torch.cat(pieces), torch.cat(values)

    return of


def _at_once(problem):
    module = Held(problem.modules, problem.by_hand or problem.outputs)

    def of():
        J, z = jacrev(lambda t: functional_call(module, t, ()), has_aux=True)(_named(module))
        return _matrix(J), z

    return of


def _row_by_row(problem):
    """One backward pass that is vectorized over rows: where torch.func does not run."""
    def of():
        z = flat(parts(problem.outputs()))
        J = torch.autograd.grad(z, problem.params, torch.eye(len(z), dtype=z.dtype), is_grads_batched=True, allow_unused=True,
                                materialize_grads=True)
        return _matrix(dict(enumerate(J))), z.detach()

    return of


def step(problem, way, mu: float) -> torch.Tensor:
    """delta, (P,)."""
    J, z = way()
    M, P = J.shape
    if problem.loss is None and M < P:
        K = J @ J.T
        K.diagonal().add_(mu)
        return J.T @ torch.cholesky_solve(z[:, None], torch.linalg.cholesky(K))[:, 0]
    if problem.loss is None:
        g, G = J.T @ z, J.T @ J
    else:
        shapes = [part.shape for part in parts(problem.outputs())]
        sizes = [shape.numel() for shape in shapes]

        def loss(t):
            return problem.loss(*[part.view(shape) for part, shape in zip(t.split(sizes), shapes, strict=True)])

        g, G = J.T @ jacrev(loss)(z), J.T @ (hessian(loss)(z) @ J)
    G.diagonal().add_(mu)
    return torch.cholesky_solve(g[:, None], torch.linalg.cholesky(G))[:, 0]
