"""What every timed step and product is checked against, in float64."""

import torch

import pgdfast

from .functions import Outputs, curvature

CG_TOLERANCE, CG_ITERATIONS = 1e-9, 20000


class Truth:
    """The damped step and J^T J v of a problem at its initial weights.

    From the explicit Jacobian of `pgdfast.reference` where that fits (problem.reference). D, F and G have Jacobians of
    0.6 to 160 GB in float64: there from products of torch.func in float64, the step by conjugate gradients on them.
    """

    def __init__(self, problem):
        self.problem = problem
        if problem.reference:
            model = problem.model()
            self._lin = pgdfast.reference.linearize(problem.closure(model), list(model.parameters()))
        else:
            self._product, self._gradient = _products(problem)

    def step(self, kind="identity"):
        """(step (P,), upper bound of its matrix's condition): (mu D + J^T J) delta = J^T r.

        D is the identity, or for "pypose" what that peer's damping amounts to: it raises the diagonal d of its unscaled
        J^T J to 1e-6 and adds mu times that.
        """
        mu, scale = self.problem.damping, None
        if kind == "pypose":
            d, least = self._lin.diagonal(), 1e-6 * self.problem.scale**2
            scale = ((1 + mu) * d.clamp_min(least) - d) / mu
        if not self.problem.reference:
            step = self.by_cg()
        else:
            found = pgdfast.reference.solve(self._lin, mu, scale=scale, solver=self.problem.solver)
            if found.status != "solved":
                raise ArithmeticError(f"{self.problem.name}: the reference's Cholesky factorization failed")
            step = found.step
        return step, 1 + self._largest(step, scale) / mu

    def by_cg(self, iterations=None):
        """The step (P,) by conjugate gradients from zero on products of torch.func, or what so many iterations make of it."""
        return _cg(lambda v: self._product(v) + self.problem.damping * v, self._gradient, iterations)

    def _largest(self, start, scale):
        """The largest eigenvalue of D^-1 J^T J, nearly, by power iteration."""
        v = start / start.norm()
        for _ in range(20):
            w = self.product(v) if scale is None else self.product(v) / scale
            size = float(w.norm())
            v = w / size
        return size

    def product(self, v):
        """J^T J v, or G v of a cross-entropy, for v (P,)."""
        return self._lin.ggn(v.double()) if self.problem.reference else self._product(v.double())


def relative_error(found, expected):
    """||found - expected|| / ||expected||, infinite where that is not a number."""
    error = float((found.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def flat(tensors):
    """All entries in one float64 vector, in order."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).double()


def _products(problem):
    """(J^T J v as a function of v, J^T r) from torch.func, for a mean or sum of squares, or a cross-entropy."""
    z, y, forward, backward = Outputs(problem, torch.float64).linearized()
    weigh, slope = curvature(problem, z, y)
    return lambda v: backward(weigh(forward(v))), backward(slope)


def _cg(apply, b, iterations=None):
    """Conjugate gradients from zero: `iterations` of them, or (None) until the true residual is CG_TOLERANCE of b."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), float(r @ r)
    target = CG_TOLERANCE * float(b.norm())
    for _ in range(iterations or CG_ITERATIONS):
        if iterations is None and rr**0.5 <= target and float((b - apply(x)).norm()) <= 2 * target:
            return x
        Ap = apply(p)
        alpha = rr / float(p @ Ap)
        x += alpha * p
        r -= alpha * Ap
        rr, before = float(r @ r), rr
        p = r + (rr / before) * p
    if iterations is not None:
        return x
    raise ArithmeticError(f"conjugate gradients in float64 did not reach {CG_TOLERANCE:g} in {CG_ITERATIONS} iterations")
