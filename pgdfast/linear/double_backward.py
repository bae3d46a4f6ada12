"""The Jacobian of any twice-differentiable closure, without reading its tape.

g(u) = J^T u is kept as a graph of u, so J v = d <g(u), v> / du. One product with J^T costs a backward pass, one with J
about two more; the Jacobian's rows come one at a time. Where a backward pass has no derivative of its own, J v takes the rows.
"""

from __future__ import annotations

import re

import torch
from torch.autograd.graph import GradientEdge

from ..kernels.protocol import Traits

# What autograd says where a backward pass cannot be differentiated.
_NO_SECOND_DERIVATIVE = re.compile("derivative for .* is not implemented|differentiate twice|not differentiable")


def double_backward(trace, params, dtype, result) -> DoubleBackward:
    """The products of a trace without a program.

    result: what the closure returned. Where code of the user's takes part in the backward, the products are checked.
    Raises ValueError where a hook or a torch.autograd.Function does not act on gradients as a Jacobian does.
    """
    operator = DoubleBackward(trace.blocks, trace.edges, params, dtype)
    if trace.foreign:
        _check(operator, trace, params, result)
    return operator


class DoubleBackward(Traits):
    """J and J^T as two backward passes; the outputs' scaling is that of the loss's blocks."""

    name = "double-backward"

    def __init__(self, blocks, edges, params, dtype):
        self._blocks, self._params, self._dtype = blocks, params, dtype
        self._shapes = [block.residual.shape for block in blocks]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.num_residuals = sum(self._sizes)
        self.num_parameters = sum(p.numel() for p in params)
        self.flops = 4.0 * self.num_residuals * self.num_parameters   # a guess: what a dense network's sweep takes
        self.arena_size = self.num_residuals + self.num_parameters   # what PyTorch makes beside its graph
        # Each output with its sign: mse_loss of two dependent tensors has two.
        self._outputs, self._owner = [], []
        for k, block_edges in enumerate(edges):
            for i, edge in enumerate(block_edges):
                if edge is not None:
                    self._outputs.append(GradientEdge(*edge))
                    self._owner.append((k, 1.0 if i == 0 else -1.0))
        self._probe = self._rows = None

    def _pullback(self):
        # Cotangents of one carry the graph of u -> J^T u, whose value is never used; at zero some have no derivative.
        if self._probe is None:
            with torch.enable_grad():
                self._cotangents = [
                    torch.ones(self._shapes[k], dtype=self._output_dtype(k), device=self._blocks[k].residual.device,
                                requires_grad=True)
                    for k, _ in self._owner
                ]
                self._probe = torch.autograd.grad(
                    self._outputs, self._params, self._cotangents, create_graph=True, allow_unused=True
                )
        return self._probe, self._cotangents

    def _output_dtype(self, k):
        return self._blocks[k].residual.dtype

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (M,)."""
        if self._rows is None:
            try:
                return self._differentiated_twice(v)
            except RuntimeError as error:   # NotImplementedError is one
                if not _NO_SECOND_DERIVATIVE.search(str(error)):
                    raise
            self.take_rows()
        return self._rows @ v

    def take_rows(self) -> None:
        """Products J v come from the rows of J from now on. Cost: M backward passes and M P numbers, once."""
        self._rows = self.dense()

    def _differentiated_twice(self, v: torch.Tensor) -> torch.Tensor:
        pulled, cotangents = self._pullback()
        parts = v.split([p.numel() for p in self._params])
        pairs = [
            (g, part.view_as(p).to(g.dtype))
            for g, part, p in zip(pulled, parts, self._params, strict=True)
            if g is not None and g.requires_grad
        ]
        pushed = [None] * len(cotangents)
        if pairs:
            graphs, vectors = zip(*pairs, strict=True)
            pushed = torch.autograd.grad(graphs, cotangents, vectors, retain_graph=True, allow_unused=True)
        totals = [torch.zeros(s, dtype=self._dtype, device=v.device) for s in self._shapes]
        for (k, sign), tangent in zip(self._owner, pushed, strict=True):
            if tangent is not None:
                totals[k] += sign * tangent.to(self._dtype)
        scaled = [_scale(b, t).reshape(-1) for b, t in zip(self._blocks, totals, strict=True)]
        return torch.cat(scaled) if scaled else v.new_empty(0)

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (P,)."""
        parts = [
            _scale_transposed(b, part.view(s))
            for b, part, s in zip(self._blocks, u.split(self._sizes), self._shapes, strict=True)
        ]
        cotangents = [(sign * parts[k]).to(self._output_dtype(k)) for k, sign in self._owner]
        pulled = torch.autograd.grad(self._outputs, self._params, cotangents, retain_graph=True, allow_unused=True)
        return torch.cat([
            (torch.zeros_like(p) if g is None else g).reshape(-1).to(self._dtype)
            for g, p in zip(pulled, self._params, strict=True)
        ])

    def dense(self) -> torch.Tensor:
        """J, (M, P), row by row."""
        if self._rows is not None:
            return self._rows
        eye = torch.eye(self.num_residuals, dtype=self._dtype, device=self._params[0].device)
        return torch.stack([self.vjp(row) for row in eye]) if len(eye) else eye.new_empty(0, self.num_parameters)


def _check(operator: DoubleBackward, trace, params, result) -> None:
    """See that u -> J^T u is linear, has J v for its adjoint, and gives the loss's gradient; take rows for J v if need be."""
    tolerance = torch.finfo(operator._dtype).eps ** 0.5
    if trace.residual.numel():
        _check_products(operator, trace, tolerance)
    if isinstance(result, torch.Tensor) and result.dim() == 0:
        _check_gradient(operator, trace, params, result, tolerance)


def _check_products(operator: DoubleBackward, trace, tolerance: float) -> None:
    u = trace.residual
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(u.numel(), generator=generator).to(u) * u.norm() / u.numel() ** 0.5
    v = torch.randn(operator.num_parameters, generator=generator).to(u)
    pulled, other, both = operator.vjp(u), operator.vjp(w), operator.vjp(2 * u + w)
    if not (both - 2 * pulled - other).norm() <= tolerance * (2 * pulled.norm() + other.norm()):
        raise ValueError(
            f"pgdfast.LM: the backward of the closure's tape ({trace.missing}) is not linear in the gradient, so that there is "
            "no Jacobian to step with; leave the hook or Function out under LM (norm_constraint bounds the length of steps)."
        )
    pushed = operator.jvp(v)
    gap = (torch.dot(pushed, w) - torch.dot(v, other)).abs()
    if not gap <= tolerance * torch.maximum(pushed.norm() * w.norm(), v.norm() * other.norm()):
        operator.take_rows()


def _check_gradient(operator: DoubleBackward, trace, params, loss: torch.Tensor, tolerance: float) -> None:
    """Raise ValueError where J^T r and the penalties' gradient are not autograd's own."""
    found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    u = trace.residual
    pulled = operator.vjp(u) if u.numel() else u.new_zeros(operator.num_parameters)
    for k, (p, g, part) in enumerate(zip(params, found, pulled.split([p.numel() for p in params]), strict=True)):
        expected = part.view_as(p) + trace.penalties.get(k, 0.0) * p.detach()
        if not (expected - (0 if g is None else g)).norm() <= tolerance * (pulled.norm() + expected.norm()):
            raise ValueError(
                f"pgdfast.LM: a hook ({trace.missing}) changes the gradient where a least-squares step cannot follow, in the "
                "loss's own operations or at a parameter with a penalty; put the factor into the loss instead."
            )


def _scale(block, t: torch.Tensor) -> torch.Tensor:
    """S^T t for one block."""
    return block.scale(t)


def _scale_transposed(block, u: torch.Tensor) -> torch.Tensor:
    """S u for one block."""
    return block.scale_transposed(u)
