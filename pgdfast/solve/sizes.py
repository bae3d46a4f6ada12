"""What predictions of cost and memory are made from: sizes, options, and how the kernels go about it."""

from __future__ import annotations

import math

from ..kernels.limits import DOUBLE_FACTOR, ONE_ARENA_BYTES, WIDE_FACTOR
from .options import CG

# Time of a solver's parts over that of a large matrix product of as many operations, measured on x86 machines: the Cholesky
# factor, an eigendecomposition counted in operations of a Cholesky, and CG's narrow products.
CHOLESKY, EIGH, SWEEP = 1.5, 25.0, 1.5


class Sizes:
    """Of one problem, solved for so many dampings.

    M, P; options: of CG; wide: a float32 problem is known to need float64 sums; scaled, penalized: there is a D, a penalty.
    local: rows separate and the kernels make use of it. explicit: dual matrices come from J.
    Operations: sweep, of a product with J or J^T; build, of one Gram matrix beside its sweeps, of which there are `outputs`;
    jacobian, of J. Bytes: block_bytes, of J beside a J^T J at most; width, of a number; arena, of a sweep; sweeps, of those for
    J or a matrix; jacobian_bytes, of J; vectors; steps, where there are many dampings; krylov, of CG without options.
    """

    def __init__(self, problem, options: CG, wide: bool = False, dampings: int = 1):
        lin = problem.linearization
        self.layout, self.kernels = rows, kernels = lin.row_layout(), lin.kernels()
        self.M, self.P = M, P = float(lin.num_residuals), float(lin.num_parameters)
        self.options, self.dampings = options, dampings
        self.scaled, self.penalized = problem.scale is not None, problem.penalty is not None
        self.sweep = max(kernels.flops, 2 * P, 2 * M)
        self.local = rows is not None and kernels.fused
        self.explicit = self.scaled or not kernels.fused
        products = min(M, P) if kernels.fused else M   # for J, where rows do not separate
        self.build, self.outputs = (rows.flops, rows.max_outputs) if self.local else (M * M * P, products)
        if not self.local and kernels.jacobian_flops is not None:
            self.outputs = kernels.jacobian_flops / self.sweep
        self.jacobian = self.outputs * self.sweep + (2 * M * P if self.local else 0.0)
        self.block_bytes = math.inf if kernels.block_bytes is None else kernels.block_bytes
        self.small = min(M, P) <= WIDE_FACTOR
        self.width = 8 if wide and self.small else lin.residual.element_size()
        self.arena = self.width * kernels.arena_size
        self.jacobian_bytes = self.width * M * P * (1 if kernels.fused else 2)   # PyTorch joins batches of rows
        # An arena per output, or batches of rows (kernels/torch_kernels.py), or rows one by one.
        self.sweeps = self.arena * (rows.max_outputs if self.local else kernels.rows_per_sweep)
        self.sweeps += 0 if self.local and self.arena > ONE_ARENA_BYTES else self.arena
        self.vectors = 8 * self.width * (M + P)
        self.steps = 2 * self.width * P * dampings if dampings > 1 else 0   # apart, and as one matrix
        # CG: b, delta, d, residual, p, A p, u, and the copies of the last check; in PyTorch also results of its operations.
        self.krylov = self.arena + self.width * (2 * M + (7 if kernels.has_cg else 15) * P)

    def factored(self, order: float) -> float:
        """Bytes of a matrix in the core and of its factor, half as large; small float32 ones are copied to float64 for it."""
        return order * order * (1.5 * self.width + (12 if self.width == 4 and order <= DOUBLE_FACTOR else 0))

    def dense(self, order: float) -> float:
        """Bytes of a matrix that PyTorch damps and factors: itself, a float64 copy, another to damp, the factor."""
        return order * order * (3 * self.width if order > WIDE_FACTOR or self.width == 8 else self.width + 24)
