"""The Jacobian of any twice-differentiable closure, without reading its tape.

g(u) = J^T u is kept as a graph of u, so J v = d <g(u), v> / du. One product with J^T costs a backward pass, one with J
about two more; the Jacobian's rows come one at a time.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import GradientEdge

from ..kernels.protocol import Traits


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
        self._probe = None

    def _pullback(self):
        # Zero cotangents carry the graph of u -> J^T u; its value is never used.
        if self._probe is None:
            with torch.enable_grad():
                self._cotangents = [
                    torch.zeros(self._shapes[k], dtype=self._output_dtype(k), device=self._blocks[k].residual.device,
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
        eye = torch.eye(self.num_residuals, dtype=self._dtype, device=self._params[0].device)
        return torch.stack([self.vjp(row) for row in eye]) if len(eye) else eye.new_empty(0, self.num_parameters)


def _scale(block, t: torch.Tensor) -> torch.Tensor:
    """S^T t for one block."""
    if block.kind == "softmax":
        return block.root * (t - (block.p * t).sum(block.dim, keepdim=True))
    return block.scale * t


def _scale_transposed(block, u: torch.Tensor) -> torch.Tensor:
    """S u for one block."""
    if block.kind == "softmax":
        weighted = block.root * u
        return weighted - block.p * weighted.sum(block.dim, keepdim=True)
    return block.scale * u
