"""LSMR: the damped least-squares problem without its normal equations, so that its condition is not squared.

Source: D. C.-L. Fong and M. Saunders, LSMR: an iterative algorithm for sparse least-squares problems, SIAM J. Sci. Comput. 33
(2011); letters and rotations as there. csrc/cpu/lsmr.cpp is the same.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..kernels.protocol import Outcome
from .options import CG
from .problem import Found, Problem
from .sizes import SWEEP, Sizes


def lsmr(problem: Problem, options: CG) -> Found:
    """LSMR on [J W; damp I] y = [r - J q/d; 0], delta = q/d + W y, where W^-2 damp^2 = d.

    Stops where its recurrence says ||A^T e|| <= tolerance ||A^T b||, e the residual: CG's test, in the variables y. The
    backward errors of Fong and Saunders would allow atol = btol = tolerance; at 1e-6 that is one to three digits less
    (bench/NOTES.md). Where they are a hundredth of the rounding unit it has "stagnated". residual_norm is the true one, of the
    normal equations. Cost per iteration: one JVP and one VJP; three more products at the end.
    """
    lin, d = problem.linearization, problem.diagonal()
    if problem.penalty is not None:
        root, damp = d.rsqrt(), 1.0
    else:
        root, damp = None if problem.scale is None else problem.scale.to(lin.dtype).rsqrt(), math.sqrt(problem.mu)

    def run(r, q):
        kernels = lin.kernels()
        call = kernels.lsmr if kernels.has_lsmr else partial(_lsmr, kernels)
        return call(r, d, root, damp, q, options.max_iterations, options.tolerance)

    return Found(run(problem.r, problem.q), lambda u: run(u.to(lin.dtype), None).step, False, {})


class LSMR:
    """The solver "lsmr"."""

    name, automatic = "lsmr", None

    def solve(self, problem, options, rcond, wide, keep, time) -> Found:
        """One solve, in float64 where its tolerance needs that."""
        return lsmr(problem.for_iterations(options), options)

    def solve_all(self, problem, mus, options, rcond) -> None:
        """Dampings are solved for one after another."""

    def operations(self, s: Sizes) -> float:
        """As many products as CG has."""
        return s.dampings * (min(s.options.max_iterations, s.M, s.P) * 2 * SWEEP * s.sweep + 4 * s.sweep)

    def bytes(self, s: Sizes) -> float:
        """See Solver."""
        return s.steps + s.krylov + 2 * s.width * s.P


def _rotation(a: float, b: float) -> tuple[float, float, float]:
    """(c, s, r) with c a + s b = r, s a - c b = 0."""
    r = math.hypot(a, b)
    return (a / r, b / r, r) if r != 0 else (1.0, 0.0, 0.0)


def _normalized(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    norm = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    return (x / norm if norm > 0 else x), norm


def _lsmr(kernels, r, d, root, damp, q, max_iterations, tolerance):
    def scaled(x):
        return x if root is None else root * x

    offset = None if q is None else q / d
    u, beta = _normalized(r if q is None else r - kernels.jvp(offset))
    v, alpha = _normalized(scaled(kernels.vjp(u)))
    x, h, hbar = torch.zeros_like(v), v.clone(), torch.zeros_like(v)
    b_norm, lowest = beta, 0.01 * torch.finfo(v.dtype).eps
    zetabar, alphabar, rho, rhobar, cbar, sbar, zeta = alpha * beta, alpha, 1.0, 1.0, 1.0, 0.0, 0.0
    first = zetabar
    betadd, betad, rhod, tautilde, thetatilde, rest, A_square = beta, 0.0, 1.0, 0.0, 0.0, 0.0, alpha**2
    status, iterations = "solved" if zetabar == 0 else "max_iterations", 0
    while status == "max_iterations" and iterations < max_iterations:
        iterations += 1
        u, beta = _normalized(kernels.jvp(scaled(v)) - alpha * u)
        A_square += beta**2
        v, alpha = _normalized(scaled(kernels.vjp(u)) - beta * v) if beta > 0 else (v, 0.0)
        A_norm = math.sqrt(A_square + damp**2)
        A_square += alpha**2

        chat, shat, alphahat = _rotation(alphabar, damp)
        rho_old, rhobar_old, zeta_old = rho, rhobar, zeta
        c, s, rho = _rotation(alphahat, beta)
        theta_new, thetabar, alphabar = s * alpha, sbar * rho, c * alpha
        cbar, sbar, rhobar = _rotation(cbar * rho, theta_new)
        if not rho * rhobar > 0:
            status = "breakdown"
            break
        zeta, zetabar = cbar * zetabar, -sbar * zetabar
        hbar = h - (thetabar * rho / (rho_old * rhobar_old)) * hbar
        x = x + (zeta / (rho * rhobar)) * hbar
        h = v - (theta_new / rho) * h

        acute, check = chat * betadd, -shat * betadd
        betahat, betadd = c * acute, -s * acute
        ctilde, stilde, rhotilde = _rotation(rhod, thetabar)
        thetatilde_old, thetatilde, rhod = thetatilde, stilde * rhobar, ctilde * rhobar
        betad = -stilde * betad + ctilde * betahat
        tautilde = (zeta_old - thetatilde_old * tautilde) / (rhotilde or math.nan)
        tau = (zeta - thetatilde * tautilde) / (rhod or math.nan)
        rest += check**2
        e_norm = math.sqrt(rest + (betad - tau) ** 2 + betadd**2)
        x_norm = float(torch.linalg.vector_norm(x))
        if abs(zetabar) <= tolerance * first:
            status = "solved"
        elif e_norm <= lowest * (b_norm + A_norm * x_norm) or abs(zetabar) <= lowest * A_norm * e_norm:
            status = "stagnated"
    step = scaled(x) if q is None else scaled(x) + offset
    g = kernels.vjp(r) if q is None else kernels.vjp(r) + q
    error = g - (kernels.vjp(kernels.jvp(step)) + d * step)
    g_norm = float(torch.linalg.vector_norm(g))
    residual = float(torch.linalg.vector_norm(error)) / g_norm if g_norm > 0 else 0.0
    dots = [float(torch.dot(a, step)) for a in (g, step, error)]
    return Outcome(step, status, iterations, residual, dots[0], dots[1], 0.0, dots[2])
