"""Damped steps from explicit Jacobians in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CONDITION = {torch.float64: 1e3, torch.float32: 1e2}   # the most that mu I + G may have


class BrokenCase(ArithmeticError):
    """The closure and the oracle's loss of a case are not the same function."""


def parts(result) -> tuple:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def real(t: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor as one real vector."""
    t = t.resolve_conj().resolve_neg()
    return (torch.view_as_real(t) if t.is_complex() else t).reshape(-1)


def flat(tensors) -> torch.Tensor:
    return torch.cat([real(t) for t in tensors])


def half_squares(*z) -> torch.Tensor:
    return sum(0.5 * real(part).square().sum() for part in z)


def loss_of(result) -> torch.Tensor:
    """The scalar that a closure's result stands for."""
    return result.sum() if isinstance(result, torch.Tensor) and result.dim() == 0 else half_squares(*parts(result))


@dataclass
class Truth:
    """g, the acceptable G = J^T H J as (J, H), H a vector or a matrix, the loss and its slope by the outputs."""

    loss: float
    gradient: torch.Tensor
    J: torch.Tensor
    curvatures: list
    slope: torch.Tensor

    def mu(self, dtype) -> float:
        """A damping that bounds the condition for each of the curvatures."""
        return max(map(self.size, self.curvatures)) / CONDITION[dtype] or 1.0

    def size(self, H) -> float:
        """The trace of G for one of the curvatures."""
        return float((_times(H, self.J) * self.J).sum())

    def steps(self, mu: float) -> list[torch.Tensor]:
        """The solutions of (mu I + G) delta = g."""
        return [_solve(self.J, H, self.gradient, mu) for H in self.curvatures]


def _times(H: torch.Tensor, J: torch.Tensor) -> torch.Tensor:
    return H[:, None] * J if H.dim() == 1 else H @ J


def _solve(J, H, g, mu):
    M, P = J.shape
    if M >= P or P <= 1000:   # condition as `mu` bounds it; that of K below is larger where H takes most of J away
        return torch.linalg.solve(mu * torch.eye(P, dtype=J.dtype) + J.T @ _times(H, J), g)
    K = mu * torch.eye(M, dtype=J.dtype) + _times(H, J @ J.T)
    return (g - J.T @ torch.linalg.solve(K, _times(H, (J @ g)[:, None])[:, 0])) / mu


def jacobian(z: torch.Tensor, params) -> torch.Tensor:
    """dz/dtheta, (M, P), by one backward pass for each element of z, (M,)."""
    rows = []
    for element in z:
        found = torch.autograd.grad(element, params, retain_graph=True, allow_unused=True) if z.requires_grad else ()
        found = found or [None] * len(params)
        rows.append(flat([torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(params, found, strict=True)]))
    return torch.stack(rows).double()


def truth(problem, check_closure: bool = True) -> Truth:
    """The truth of a float64 problem at its parameters and data. Raises BrokenCase."""
    params = problem.params
    state = torch.get_rng_state()
    outputs = parts(problem.outputs())
    J = jacobian(flat(outputs), params)
    points = [z.detach().requires_grad_() for z in outputs]
    loss = (problem.loss or half_squares)(*points)
    slope = torch.autograd.grad(loss, points, materialize_grads=True)
    slope = flat(slope).double()
    found = Truth(float(loss.detach()), J.T @ slope, J, [], slope)
    if problem.loss is None:
        found.curvatures.append(torch.ones(len(J), dtype=torch.float64))
    elif problem.exact:
        found.curvatures.append(output_hessian(problem.loss, outputs))
    found.curvatures += [curvature(*[z.detach() for z in outputs]).double() for curvature in problem.curvatures]
    if check_closure:
        torch.set_rng_state(state)
        check(problem, found)
    return found


def output_hessian(loss, outputs) -> torch.Tensor:
    """d2 loss / dz2 over all elements of the outputs."""
    shapes = [z.shape for z in outputs]

    def of(z):
        return loss(*[part.view(s) for part, s in zip(z.split([s.numel() for s in shapes]), shapes, strict=True)])

    z = flat([z.detach() for z in outputs]).requires_grad_()
    (slope,) = torch.autograd.grad(of(z), z, create_graph=True, materialize_grads=True)
    return jacobian(slope, [z])


def check(problem, found: Truth) -> None:
    """Compare loss and gradient of the closure with those that the oracle's functions give."""
    loss = loss_of(problem.closure()) if problem.plain is None else problem.plain()
    gradient = torch.autograd.grad(loss, problem.params, allow_unused=True, materialize_grads=True)
    gradient = flat([g.to_dense() for g in gradient]).double()
    loss = loss.detach()
    if abs(float(loss) - found.loss) > 1e-9 * abs(found.loss) + 1e-12:
        raise BrokenCase(f"the closure's loss is {float(loss):.10g}, the oracle's {found.loss:.10g}")
    if not (gradient - found.gradient).norm() <= 1e-8 * found.gradient.norm() + 1e-12:
        error = (gradient - found.gradient).norm() / found.gradient.norm()
        raise BrokenCase(f"the closure's gradient is {float(error):.1e} off the oracle's")
