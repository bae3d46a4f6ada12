"""The C++ core. Tensors are contiguous CPU tensors of the plan's dtype; results are written to the tensors handed over.

Solves return (status, iterations, residual norm, gain, square, trace, slack): the numbers of kernels.protocol.Outcome, the
status by number. Memory that runs out is a MemoryError. Calls release the GIL; those of one plan wait for each other.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

torch_version: str
STATUS: tuple[str, ...]
CG_STATE: tuple[str, ...]
CG_PHASES: tuple[str, ...]

_Numbers = tuple[int, int, float, float, float, float, float]

class _Factor:
    """The Cholesky factor of one solve or given matrix; vectors are in residual order where it is that of the dual matrix."""

    order: int
    is_dual: bool
    bytes: int
    def solve(self, b: Tensor, x: Tensor) -> None:
        """X = F^-1 b; x may be b."""
    def dual_vector(self, y: Tensor) -> None:
        """Write y of the solve; ValueError for a primal factor, or where there is none."""
    def set_dual_vector(self, y: Tensor) -> None:
        """Keep y; ValueError for a primal factor."""

class FactorFloat(_Factor): ...
class FactorDouble(_Factor): ...

class _Packed:
    """The factors of all rows of J, packed (csrc/cpu/packed.h)."""

    num_residuals: int
    def header(self) -> list[int]:
        """Return what `packed_float` and `packed_double` need besides the numbers."""
    def tensor(self) -> Tensor:
        """Return the numbers, one-dimensional, in shared memory."""

class PackedFloat(_Packed): ...
class PackedDouble(_Packed): ...

class _Plan:
    """A program with its constants, its products and its solves."""

    num_residuals: int
    num_parameters: int
    flops: float
    arena_size: int
    normal_pays: bool
    rows_of_parts: list[int]
    has_rows: bool
    def __init__(
        self, words: Tensor, alphas: Sequence[float], constants: Sequence[tuple[Sequence[int], Sequence[int]] | None],
        functions: Sequence[int],
    ) -> None:
        """Words and alphas as kernels.encoding.encoded makes them; per constant (sizes, strides), None for a number."""
    def bind(self, constants: list[Any], row_scale: Tensor | None = None) -> bool:
        """Point at these constants, and factors (M,) of the rows of J; False where a constant is laid out differently."""
    def set_members(self, count: int, shifts: Sequence[int], spans: Sequence[int]) -> None: ...
    def select(self, member: int) -> None: ...
    def set_rows(self, words: Tensor) -> None:
        """Take a row layout as kernels.encoding.encoded_rows makes it."""
    def clear_rows(self) -> None: ...
    def jvp(self, v: Tensor, u: Tensor) -> None: ...
    def vjp(self, u: Tensor, v: Tensor) -> None: ...
    def vjps(self, U: Tensor, K: int, V: Tensor) -> None: ...
    def dense(self, J: Tensor) -> None: ...
    def gram(self, weights: Tensor, K: Tensor) -> None: ...
    def add_normal(self, H: Tensor) -> None:
        """Add J^T J to the upper triangle of H, (P + 1, gram_stride)."""
    def pack(self) -> Any:
        """Return a PackedFloat or PackedDouble."""
    def gram_order(self) -> list[int]:
        """Return of every residual its row of the Gram matrix."""
    def columns(self, parameters: Sequence[int], J: Tensor) -> None: ...
    def squared(self, A: Tensor, rows: int, columns: int, transposed: bool, K: Tensor) -> None: ...
    def diagonal(self, d: Tensor) -> None: ...
    def dual(self, r: Tensor, weights: Tensor, shift: float, q: Tensor | None, delta: Tensor) -> tuple[Any, ...]:
        """Return the numbers of the outcome, then the factor, or None where the matrix is not positive definite."""
    def primal(self, r: Tensor, d: Tensor, q: Tensor | None, delta: Tensor) -> tuple[Any, ...]:
        """As dual."""
    def cg(
        self, r: Tensor, d: Tensor, q: Tensor | None, inverse: Tensor | None, V: Tensor | None, c: Tensor | None,
        start: Tensor | None, path: Tensor | None, max_iterations: int, tolerance: float, absolute: float, progress: float,
        delta: Tensor,
    ) -> tuple[_Numbers, list[tuple[int, int, float, float, float]]]: ...
    def multishift(
        self, r: Tensor, q: Tensor | None, mu: Sequence[float], scale: Tensor | None, penalty: Tensor | None,
        max_iterations: int, tolerance: float, absolute: float, steps: Tensor,
    ) -> list[_Numbers]: ...
    def lsmr(
        self, r: Tensor, d: Tensor, root: Tensor | None, damp: float, q: Tensor | None, max_iterations: int, tolerance: float,
        delta: Tensor,
    ) -> _Numbers: ...
    def members_dual(
        self, listed: Sequence[int], r: Tensor, mu: Tensor, penalty: Sequence[float], q: Tensor | None, delta: Tensor,
        out: Tensor,
    ) -> None:
        """Write the outcomes of the members listed to out, (listed, kOutcomeNumbers), float64."""
    def members_primal(
        self, listed: Sequence[int], r: Tensor, mu: Tensor, penalty: Sequence[float], scale: Tensor | None, q: Tensor | None,
        delta: Tensor, out: Tensor,
    ) -> None: ...
    def members_cg(
        self, listed: Sequence[int], r: Tensor, mu: Tensor, penalty: Sequence[float], scale: Tensor | None, q: Tensor | None,
        inverse: Tensor | None, start: Tensor | None, max_iterations: int, tolerance: float, absolute: float, progress: float,
        delta: Tensor, out: Tensor,
    ) -> None: ...

class PlanFloat(_Plan): ...
class PlanDouble(_Plan): ...

class Replay:
    """What the constants of a known structure are on its tape (csrc/tape/replay.h)."""

    num_fields: int
    def __init__(self, wide: bool) -> None: ...
    def add_field(self, place: int, node: Any, name: str, same: int, seen: Any) -> None: ...
    def add_window(self, field: int, sizes: Sequence[int], strides: Sequence[int], offset: int) -> None: ...
    def add_number(self, number: float) -> None: ...
    def add_gap(self) -> None: ...
    def returned_residuals(self) -> None: ...
    def scalar_loss(self, blocks: Sequence[tuple[int, int, float]]) -> None: ...

class Walker:
    """Recognizes the structures of autograd tapes over fixed parameters."""

    generation: int   # how often all structures were forgotten; their numbers are never used again
    def __init__(self, params: list[Tensor]) -> None: ...
    def walk(self, roots: list[Tensor]) -> tuple[int, bool, list[Any], list[int]]:
        """Return (number of the structure, is it new, nodes, positions of active nodes with hooks).

        All nodes, inputs before users, where the structure is new, else those that were wanted. Tapes that differ in which
        nodes have hooks are different structures. User-defined Functions are told apart by their type, not by its name.
        """
    def want(self, structure: int, places: Sequence[int]) -> None: ...
    def read(self, result: Any) -> tuple[Any, ...] | None:
        """Return what a replay reads off a closure's result; None where none fits, or a node has hooks."""
    def attach(self, structure: int, replay: Replay, attached: Any, places: Sequence[int]) -> None: ...
    def detach(self, structure: int, attached: Any) -> None: ...

def configure() -> None:
    """Take PGDFAST_ISA, PGDFAST_BLAS and PGDFAST_PASS_BYTES; ValueError for a value that is not known."""

def limits() -> dict[str, int | float]:
    """Return the thresholds of csrc/plan/limits.h by the names that they have there."""

def cg_begin(b_norm: float, limits: Sequence[float], has_start: bool) -> list[float]:
    """Return the state of a CG solve, the numbers that CG_STATE names (csrc/plan/cg_rules.h).

    limits: max_iterations, tolerance, absolute, progress, slots. Of the state, phase is an index into CG_PHASES, status one
    into STATUS.
    """

def cg_start(state: Sequence[float], along: float, curvature: float) -> list[float]:
    """Return the state with the multiple of a start in step and value: zero where no multiple is better."""

def cg_step(state: Sequence[float], curvature: float) -> list[float]:
    """Return the state with the length of the step along p, or broken."""

def cg_judge(state: Sequence[float], limits: Sequence[float], values: Sequence[float]) -> list[float]:
    """Return what follows from a turn of the loop, whose norm, rz and, in a check, gain and slack are filled in.

    values: the model's reduction at every iterate before this one; may be empty where progress is 0.
    """

def subtract(params: list[Tensor], rates: Sequence[float], direction: Tensor) -> bool:
    """theta_l -= rate_l * direction_l for contiguous CPU parameters of one dtype; False, with nothing done, elsewhere."""

def copy_tensors(to: list[Tensor], source: list[Tensor]) -> bool:
    """Copy contiguous CPU tensors pairwise, in place; False, with nothing done, where a pair differs in dtype or size."""

def gram_stride_float(order: int) -> int:
    """Return the row length of matrices of this order as the core keeps them."""

def gram_stride_double(order: int) -> int: ...
def factor_float(H: Tensor, order: int, added: Tensor, positions: Sequence[int] | None) -> tuple[FactorFloat | None, float]:
    """Return the factor of H + diag(added), added (order,) in float64, and the trace of H diag(added)^-1."""

def factor_double(
    H: Tensor, order: int, added: Tensor, positions: Sequence[int] | None
) -> tuple[FactorDouble | None, float]: ...
def packed_float(header: Sequence[int], tensor: Tensor) -> PackedFloat:
    """Return what `header` describes over a tensor's numbers, which is kept; RuntimeError where they do not fit."""

def packed_double(header: Sequence[int], tensor: Tensor) -> PackedDouble: ...
def gram_rows_float(
    a: PackedFloat, b: PackedFloat, first: int, last: int, weights: Tensor | None, K: Tensor, row: int, column: int
) -> None:
    """Write rows first .. last - 1 of J_a W J_b^T to K at (row, column); of one object's, from the diagonal on."""

def gram_rows_double(
    a: PackedDouble, b: PackedDouble, first: int, last: int, weights: Tensor | None, K: Tensor, row: int, column: int
) -> None: ...
def fail_in_parallel(kind: str, threads: int, failing: int) -> None: ...
def instruction_set() -> str: ...
def blas() -> str: ...
def select_blas(name: str) -> str:
    """Take "mkl" or "aten"; ValueError for others."""

def blas_threads(count: int) -> int: ...
def jet_chain_float(*arguments: Any) -> None: ...
def jet_chain_double(*arguments: Any) -> None: ...
def jet_adjoint_float(*arguments: Any) -> None: ...
def jet_adjoint_double(*arguments: Any) -> None: ...
