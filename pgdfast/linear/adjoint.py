"""Are the products with J those of the closure? Asked of autograd, once per structure of a tape.

Two tests with a random cotangent w and tangent v: <J v, w> = <v, J^T w>, and, for each parameter, J^T w against autograd's own
backward of w; of a loss, J^T r against its gradient. They read the tape that there is; the closure does not run again.
Cost: one product with J, at most two with J^T, one backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..tape import real_gradient, real_views

CHECKS = ("first", "every", "never")


def checked(check: str, name: str) -> str:
    """`check` itself. Raises ValueError for anything but one of CHECKS."""
    if check not in CHECKS:
        raise ValueError(f"pgdfast.{name}: unknown check {check!r}; use 'first', 'every' or 'never'.")
    return check


class Disagreement(NamedTuple):
    """What differs.

    parameters: numbers of those for which J^T w is not what autograd has. adjoint: is J not the adjoint of J^T? finite: is all
    of autograd's?
    """

    parameters: list[int]
    adjoint: bool
    finite: bool = True


class Flat(NamedTuple):
    """Products of flat vectors, (P,) and (M,). count: of the networks whose parameters are compared apart, in an ensemble."""

    jvp: Callable
    vjp: Callable
    count: int = 1


def tolerance_of(trace) -> float:
    """How far apart two ways to one sum may be, relative to its terms: eps^(1/3) of the coarsest type on the tape.

    Two orders of summation differ by eps times the condition of the sums, of those inside of the network too. Faults in rules,
    a term or sign that is missing, are of the order of one. The root leaves room for conditions up to 1e10 in float64 and 4e4
    in float32, and for PyTorch's own constants, which are float32 in some backward passes of float64 tensors.
    """
    eps = max(torch.finfo(trace.residual.dtype).eps, trace.structure.eps)
    return (eps if eps < 1e-8 else max(eps, _eps_of_products())) ** (1 / 3)


def _eps_of_products() -> float:
    """Rounding unit of matrix products in float32, which PyTorch may be told to make in less."""
    try:
        return {"highest": 0.0, "high": 2.0**-10}.get(torch.get_float32_matmul_precision(), 2.0**-7)
    except RuntimeError:   # told in a newer way, of each device and operation
        return 2.0**-7


def disagreement(products, trace, params, result, adjoint: bool = True) -> Disagreement | None:
    """What disagrees, or None.

    products: with a J v of None if that does not exist. result: what the closure returned; of an ensemble the sum of its
    losses. adjoint: is J v to be compared? Elements that are not finite for autograd are not judged, nor is a gradient through
    a checkpoint with use_reentrant=True, which autograd has for all parameters at once alone.
    Raises ValueError where the tape is gone.
    """
    r, count, tolerance = trace.residual, products.count, tolerance_of(trace)
    generator = torch.Generator().manual_seed(0)
    scalar = isinstance(result, torch.Tensor) and result.dim() == 0
    size = float(torch.linalg.vector_norm(r, dtype=torch.float64))
    w = _cotangent(r, scalar and 0 < size < math.inf, generator)
    reals = real_views(params)
    pulled = products.vjp(w) if r.numel() else r.new_zeros(sum(p.numel() for p in reals))
    found = pulled
    if scalar:
        found = products.vjp(r) if r.numel() else pulled
    expected = None
    exact = scalar and r.numel() > 0 and size == 0   # where autograd has one of many slopes of a kink
    if not trace.structure.hides and not exact:
        expected = _gradient(result if isinstance(result, (tuple, list)) else [result], None if scalar else w, params)
    squares = sum(float(p.detach().double().nan_to_num(0.0, 0.0, 0.0).square().sum()) for p in reals)
    norm = max(squares, float(pulled.numel()), 1.0) ** 0.5
    length = float(torch.linalg.vector_norm(w, dtype=torch.float64))
    natural = length * (size if 0 < size < math.inf else length) / norm   # of J^T w, where J is about r over the parameters
    wrong = [] if expected is None else _wrong(trace, reals, count, (tolerance, natural), found, pulled, expected)
    if not adjoint or not r.numel():
        return Disagreement(wrong, False, _finite(expected)) if wrong else None
    v = torch.randn(pulled.numel(), generator=generator).to(pulled)
    pushed = products.jvp(v)
    apart = pushed is not None and _apart(
        pushed.double() * w.double(), v.double() * pulled.double(), tolerance, natural * float(v.norm())
    )
    return Disagreement(wrong, apart, _finite(expected)) if wrong or apart else None


def _finite(gradients) -> bool:
    """Whether autograd has all of them, and finite."""
    return gradients is not None and all(g is None or bool(g.isfinite().all()) for g in gradients)


def _apart(rows: torch.Tensor, columns: torch.Tensor, tolerance: float, natural: float) -> bool:
    """Whether two sums differ by more than the tolerance allows for terms in any order."""
    gap, size = (rows.sum() - columns.sum()).abs(), rows.norm() + columns.norm()
    return bool(~(gap <= tolerance * (size + tolerance * natural)) & columns.isfinite().all())


def _cotangent(r: torch.Tensor, as_residuals: bool, generator) -> torch.Tensor:
    """A w without order in its signs, so that J^T w is as large as its terms; as_residuals: with the entries' size of r."""
    if not as_residuals:
        return torch.randn(r.numel(), generator=generator).to(r)
    # Of residuals whose square roots of curvatures vanish, only the products with these are of ordinary size.
    return r * (2 * torch.randint(0, 2, (r.numel(),), generator=generator) - 1).to(r)


def _gradient(results, w: torch.Tensor | None, params) -> list[torch.Tensor | None]:
    """Autograd's J^T w of tensors by the parameters' real numbers, w laid out as the residuals are, None for 1.

    None for parameters that are not reached.
    """
    cotangents = [None] * len(results)
    if w is not None:
        parts = w.split([t.numel() for t in results])
        # Copies: as complex numbers a part can be read only from an even place in memory.
        cotangents = [part.view(t.shape).to(t.dtype, copy=True) for part, t in zip(parts, results, strict=True)]
    pairs = [(t, c) for t, c in zip(results, cotangents, strict=True) if t.requires_grad and t.numel()]
    asked = [p for p in params if p.requires_grad]
    if not pairs or not asked:
        return [None] * len(params)
    tensors, cotangents = zip(*pairs, strict=True)
    try:
        found = iter(torch.autograd.grad(tensors, asked, cotangents, retain_graph=True, allow_unused=True))
    except RuntimeError as error:
        if "already been freed" in str(error) or "second time" in str(error):
            raise ValueError(
                "pgdfast.LM: the closure's tape is gone because the closure called backward() itself; return the loss or the "
                "residuals without calling backward()."
            ) from error
        raise
    gradients = [next(found) if p.requires_grad else None for p in params]
    return [g if g is None else real_gradient(g if g.layout is torch.strided else g.to_dense()) for g in gradients]


def _wrong(trace, params, count: int, limits, found, pulled, expected) -> list[int]:
    """Numbers of the parameters whose J^T w, or gradient, is not as expected.

    Where that is finite only in part, one NaN may reach further in ours: products with 0 do not drop it.
    """
    sizes, (tolerance, natural) = [p.numel() for p in params], limits
    gaps, scales = [], []
    whole = found.new_ones(count, 1, dtype=torch.bool)
    for g in expected:
        whole = whole if g is None else whole & g.isfinite().reshape(count, -1).all(1, keepdim=True)
    for k, (p, g, ours, free) in enumerate(zip(params, expected, found.split(sizes), pulled.split(sizes), strict=True)):
        theirs = torch.zeros_like(p) if g is None else g
        theirs, ours, free = (t.detach().double().reshape(count, -1) for t in (theirs, ours, free))
        penalty = trace.penalties.get(k, 0.0) * p.detach().double().reshape(count, -1)
        judged = theirs.isfinite() & (whole | ours.isfinite())
        gaps.append(torch.where(judged, ours + penalty - theirs, 0.0).norm(dim=1))
        parts = [torch.where(judged, t, 0.0).nan_to_num(0.0, 0.0, 0.0).norm(dim=1) for t in (ours, free, penalty)]
        scales.append(torch.stack(parts).sum(0))
    total = torch.stack(scales).sum(0) + natural
    # What is zero but for rounding, such as the gradient of a bias before a batch norm, is so beside all the others, or beside
    # what is natural, as that of the one logit of a softmax.
    return [
        k for k, (gap, scale) in enumerate(zip(gaps, scales, strict=True))
        if bool((~(gap <= tolerance * (scale + tolerance * total))).any())
    ]
