"""One closure, linearized around the present parameters: an explicit float64 Jacobian."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import Block, depends_on, residual_block
from .precision import Float64, float64_parameters
from .tails import ends_in_loss, scalar_blocks


@dataclass(frozen=True)
class Linearization:
    """A weighted least-squares problem: gradient = J^T r, generalized Gauss-Newton = J^T J.

    Attributes:
        loss: 0-dim float64, the loss at the present parameters.
        residual: r, (M,) float64, scaled as above.
        jacobian: J, (M, P) float64, scaled as above.
        squares_only: the loss is a sum of squares with constant weights.
        scalar: the closure returned the loss itself, in one number.

    """

    loss: Tensor
    residual: Tensor
    jacobian: Tensor
    squares_only: bool = True
    scalar: bool = True

    @property
    def num_residuals(self) -> int:
        """M, the number of rows of J."""
        return self.jacobian.shape[0]

    @property
    def num_parameters(self) -> int:
        """P, the number of columns of J."""
        return self.jacobian.shape[1]

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (P,) -> (M,) float64."""
        return self.jacobian @ v.to(self.jacobian)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (M,) -> (P,) float64."""
        return self.jacobian.T @ u.to(self.jacobian)

    def ggn(self, v: Tensor) -> Tensor:
        """J^T J v: (P,) -> (P,) float64."""
        return self.vjp(self.jvp(v))

    def gram(self) -> Tensor:
        """J J^T, (M, M) float64."""
        return self.jacobian @ self.jacobian.T

    def dense(self) -> Tensor:
        """J, (M, P) float64."""
        return self.jacobian

    def diagonal(self) -> Tensor:
        """diag(J^T J), (P,) float64: the squared length of each column."""
        return self.jacobian.square().sum(0)


def linearize(closure: Callable, params: Sequence[Tensor]) -> Linearization:
    """Run the closure once in float64 and differentiate it row by row.

    Args:
        closure: takes nothing and returns a residual tensor of at least one dimension, or a tuple
            or list of tensors (the loss is then 1/2 ||r||^2), or a 0-dim loss: weighted squares,
            cross-entropies, any sum of convex functions of what a model computes; see tails.py.
        params: leaf tensors that require gradients; their order defines the flat vector of P
            numbers, each laid out by ``p.reshape(-1)``, a complex one as its real and imaginary
            parts side by side. Their data, dtype and ``.grad`` are the
            same tensors afterwards. A parameter that the loss does not reach has zero columns.

    Returns:
        The linearization; M may be 0.

    Raises:
        ValueError: the parameters are not distinct leaves that require gradients; the result
            is of no known form, has a negative weight, does not depend on the parameters, is not
            finite, or its tape was freed by a backward() inside the closure.

    Cost: M backward passes.

    """
    params = list(params)
    _check_parameters(params)
    with float64_parameters(params), torch.enable_grad():
        with Float64():
            result = closure()
        try:
            loss, blocks, scalar = _read(result, params)
            residual, jacobian = _assemble(blocks, params)
        except RuntimeError as error:
            if "already been freed" not in str(error):
                raise
            raise ValueError(
                "pgdfast.reference: the tape of the closure's result has been freed; the closure "
                "must not call backward(), only return the loss or the residual"
            ) from error
    for name, value in (("loss", loss), ("residual", residual), ("Jacobian", jacobian)):
        if not value.isfinite().all():
            raise ValueError(
                f"pgdfast.reference: the {name} is not finite at the present parameters; "
                "start from parameters and data that give finite values"
            )
    return Linearization(loss, residual, jacobian, all(block.squares for block in blocks), scalar)


def residual(closure: Callable, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss (0-dim) and the residual (M,), float64, of one run of the closure, without a Jacobian.

    The order and the errors are those of `linearize`, but for values that are not finite: these come back.
    """
    params = list(params)
    with float64_parameters(params), torch.enable_grad():
        with Float64():
            result = closure()
        loss, blocks, _ = _read(result, params)
    empty = params[0].new_zeros(0, dtype=torch.float64)
    return loss.detach(), torch.cat([empty, *(b.residual.detach().reshape(-1) for b in blocks)])


def _check_parameters(params: list[Tensor]) -> None:
    if not params:
        raise ValueError("pgdfast.reference: params is empty; pass at least one tensor")
    if len({id(p) for p in params}) < len(params):
        raise ValueError("pgdfast.reference: params holds the same tensor twice; pass it once")
    for i, p in enumerate(params):
        if not (p.is_leaf and p.requires_grad and (p.is_floating_point() or p.is_complex())):
            raise ValueError(
                f"pgdfast.reference: params[{i}] must be a floating-point leaf tensor with "
                f"requires_grad=True; got dtype {p.dtype}, is_leaf={p.is_leaf}, "
                f"requires_grad={p.requires_grad}"
            )


def _read(result, params: list[Tensor]) -> tuple[Tensor, list[Block], bool]:
    """Return the loss and the rows of what the closure returned, and whether that was the loss itself."""
    tensors = list(result) if isinstance(result, (tuple, list)) else [result]
    for t in tensors:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = f"a {t.dtype} tensor" if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise ValueError(
                f"pgdfast.reference: the closure returned {got}; return a real floating-point "
                "scalar loss, a residual tensor, or a tuple of residual tensors"
            )
    if any(t.numel() for t in tensors) and not any(depends_on(t, params) for t in tensors):
        raise ValueError(
            "pgdfast.reference: the closure's result does not depend on any of params; compute it "
            "from them with autograd on (no detach(), no torch.no_grad())"
        )
    if isinstance(result, Tensor) and result.dim() == 0:
        return result.detach().double(), scalar_blocks(result, params), True
    if isinstance(result, Tensor) and result.numel() == 1 and result.requires_grad:
        blocks = _as_loss(result, params)
        if blocks is not None:
            return result.detach().double().reshape(()), blocks, True
    blocks = [residual_block(t) for t in tensors]
    loss = torch.zeros((), dtype=torch.float64, device=params[0].device)
    return loss + sum(0.5 * b.residual.square().sum() for b in blocks), blocks, False


def _as_loss(result: Tensor, params: list[Tensor]) -> list[Block] | None:
    """Return the blocks of a one-entry result with dimensions that is a loss; None where it is one residual.

    Raises ValueError where it may be either: squares with a constant beside them.
    """
    loss = result.reshape(())
    try:
        blocks = scalar_blocks(loss, params)
    except ValueError:
        return None
    named, several = ends_in_loss(loss), any(block.residual.numel() > 1 for block in blocks)
    if not all(block.squares for block in blocks) or not (several or named):
        return blocks if named else None
    half, value = 0.5 * sum(block.residual.square().sum() for block in blocks), loss.detach()
    if (half - value).abs() <= 1e-6 * value.abs():
        return blocks
    raise ValueError(
        f"pgdfast.reference: the closure returned a tensor of shape {tuple(result.shape)} whose tape ends as a loss does; "
        "return loss.squeeze() to minimize it as the loss that it is, or the tuple (r,) if it is a residual"
    )


def _assemble(blocks: list[Block], params: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack r and J = S^T dz/dtheta over the blocks."""
    num_parameters = sum(_real(p.detach()).numel() for p in params)
    residuals = [params[0].new_zeros(0, dtype=torch.float64)]
    jacobians = [params[0].new_zeros(0, num_parameters, dtype=torch.float64)]
    for block in blocks:
        residuals.append(block.residual.reshape(-1))
        jacobians.append(block.root(_differentiate(block, params)).reshape(-1, num_parameters))
    return torch.cat(residuals).detach(), torch.cat(jacobians).detach()


def _differentiate(block: Block, params: list[Tensor]) -> Tensor:
    """dz/dtheta of shape (*Z, P), one backward pass for each element of z."""
    rows = block.residual.new_zeros(block.residual.numel(), sum(_real(p.detach()).numel() for p in params))
    outputs = [edge for edge, _ in block.edges]
    for i in range(len(rows) if outputs else 0):
        unit = torch.zeros_like(block.residual, memory_format=torch.contiguous_format)
        unit.view(-1)[i] = 1.0
        gradients = torch.autograd.grad(
            outputs,
            params,
            grad_outputs=[sign * unit for _, sign in block.edges],
            retain_graph=True,
            allow_unused=True,
        )
        rows[i] = torch.cat(
            [
                _real(torch.zeros_like(p) if g is None else g.to_dense())
                for p, g in zip(params, gradients, strict=True)
            ]
        )
    return rows.view(*block.residual.shape, rows.shape[1])


def _real(t: Tensor) -> Tensor:
    """A tensor's numbers, flat, a complex one as its real and imaginary part."""
    return (torch.view_as_real(t.resolve_conj().resolve_neg()) if t.is_complex() else t).reshape(-1)
