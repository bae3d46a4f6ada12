"""What each solver allocates at its peak, beyond the linearisation itself: predicted from sizes, in bytes."""

from __future__ import annotations

import os

from .cg import SLOTS
from .multishift import PANEL
from .options import CG, Nystrom
from .problem import DOUBLE_FACTOR, WIDE_FACTOR, Problem

_PASS, _ONE_ARENA = 64 << 20, 64 << 20   # bytes: kPassBytes of csrc/cpu/gram.cpp, kOneArenaBytes of csrc/cpu/solve.h


def memory_limit() -> float:
    """Half of the memory that is free now, in bytes."""
    try:
        return 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4e9


def predicted_bytes(problem: Problem, options: CG, wide: bool = False, dampings: int = 1) -> dict[str, float]:
    """{solver: bytes}: matrices and factors, arenas (one per section of a row), J where it is formed, vectors.

    wide: a float32 problem is known to need float64 sums. dampings: steps that are solved for from one linearisation.
    """
    lin = problem.linearization
    operator, rows = lin.operator, lin.rows
    M, P = float(lin.num_residuals), float(lin.num_parameters)
    small = min(M, P) <= WIDE_FACTOR
    width = 8 if wide and small else lin.residual.element_size()
    arena = width * operator.arena_size
    local = rows is not None and operator.fused
    jacobian = width * M * P * (1 if operator.fused else 2)   # PyTorch joins batches of rows
    # Sweeps for J or the Gram matrix: an arena per section, or batches of rows (kernels/torch_kernels.py), or rows one by one.
    sweeps = arena * (rows.max_sections if local else operator.rows_per_sweep)
    sweeps += 0 if local and arena > _ONE_ARENA else arena
    vectors = 8 * width * (M + P)
    if local and problem.scale is None:
        packed = width * (M * rows.explicit_columns + rows.packed)   # a pass takes all, or a part
        dual = _factored(M, width) + max(min(packed, max(_PASS, width * M * M / 4)), width * rows.largest)
    else:
        dual = jacobian + (width * M * P if problem.scale is not None else 0) + M * M * _dense(M, width)
    if local and operator.sums_sections:
        primal = _factored(P, width) + width * rows.packed
    else:
        primal = jacobian + (_factored(P, width) if operator.fused else P * P * _dense(P, width))
    least = min(M, P)
    rows_of_eigh = 0 if M <= P and local and problem.scale is None else M * P * (8 if small else width)
    # CG: b, delta, d, residual, p, A p, u, and the copies of the last check.
    krylov = arena + width * (2 * M + (7 if operator.has_cg else 15) * P)   # PyTorch: and the results of its operations
    cg = krylov
    if problem.scale is not None or options.preconditioner is not None:
        cg += width * P
    if options.preconditioner == "jacobi" and not local:
        cg += jacobian + sweeps
    if isinstance(options.preconditioner, Nystrom):
        cg += 5 * width * min(options.preconditioner.rank, P) * P   # products, factors of the sketch, the sketch
    if options.warm_start:
        cg += width * P
    if options.truncate:
        cg += SLOTS * width * P
    steps = 2 * width * P * dampings if dampings > 1 else 0   # apart, and as one matrix
    if dampings > 1 and options.shifts:
        cg += width * (dampings + PANEL) * P
    return {
        "dual": steps + dual + sweeps + vectors,
        "primal": steps + primal + sweeps + vectors,
        "cg": steps + cg,
        "eigh": steps + 48 * least**2 + rows_of_eigh + sweeps + vectors,
        "lsmr": steps + krylov + 2 * width * P,
    }


def _factored(order: float, width: int) -> float:
    """Bytes of a matrix in the core and of its factor, half as large; small float32 ones are copied to float64 for it."""
    return order * order * (1.5 * width + (12 if width == 4 and order <= DOUBLE_FACTOR else 0))


def _dense(order: float, width: int) -> int:
    """Bytes per entry of a matrix that PyTorch damps and factors: itself, a float64 copy, another to damp, the factor."""
    return 3 * width if order > WIDE_FACTOR or width == 8 else width + 24
