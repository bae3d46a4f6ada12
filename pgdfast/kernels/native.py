"""The C++ core: a program as one plan, whole solves as one call."""

from __future__ import annotations

import contextlib
import importlib

import torch
from torch.autograd import forward_ad

from .encoding import encoded, encoded_rows
from .protocol import STATUS, Outcome, Traits

REBUILD = "rebuild it with: pip install --force-reinstall --no-deps --no-cache-dir . (in the pgdfast source folder)"

try:
    _C = importlib.import_module("pgdfast._C")
except ModuleNotFoundError:   # a source folder without a build; available() says so
    _C = None
except ImportError as error:
    raise ImportError(
        f"pgdfast's C++ core does not load into PyTorch {torch.__version__}, most likely because it was built against "
        f"another one ({error}); {REBUILD}."
    ) from error
if _C is not None:
    _C.configure()   # an unknown value of PGDFAST_ISA or PGDFAST_BLAS is a ValueError

_TABLE = {} if _C is None else _C.limits()   # limits.py, for everybody else, takes the core from here
LIMITS = "on the CPU in float32 and float64"


def available() -> str | None:
    """None, or why the native core cannot be used."""
    return None if _C is not None else "the C++ core is not built; run pip install . in the source folder"


def applies(device: torch.device, dtype: torch.dtype) -> bool:
    """Runs on the CPU in float32 and float64."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64)


def walker(params: list[torch.Tensor]):
    """The core's recognizer of tape structures over these parameters, or None without the core."""
    return None if _C is None else _C.Walker(params)


def replay(dtype: torch.dtype):
    """An empty reader of tapes for a program of this dtype (csrc/tape/replay.h); needs the core."""
    return _C.Replay(wide=dtype == torch.float64)


def _no_core(*_) -> bool:
    return False


# theta_l -= rate_l * direction_l, and copies of tensors one by one, each in one call; False, with nothing done, where the core
# cannot: (params, rates, direction) and (to, from).
subtract = _no_core if _C is None else _C.subtract
copy_tensors = _no_core if _C is None else _C.copy_tensors


@contextlib.contextmanager
def lapack_threads(order: int):
    """For a scope, LAPACK on one thread for matrices of a small order, which a second one slows down (bench/NOTES.md)."""
    if _C is None or order > _TABLE["kOneThreadOrder"]:
        yield
        return
    before = _C.blas_threads(1)
    try:
        yield
    finally:
        _C.blas_threads(before)


def applies_to_jets(*tensors: torch.Tensor | None) -> bool:
    """Whether the core takes these to a layer in Taylor mode: CPU tensors of one dtype, outside of function transforms."""
    if _C is None or torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return False
    dtype = tensors[0].dtype
    if dtype is not torch.float64 and dtype is not torch.float32:
        return False
    return all(t is None or (t.dtype is dtype and t.device.type == "cpu") for t in tensors)


def jet_chain(x, along, parameters, forms, weights, directions, keep=False):
    """A chain of layers in Taylor mode (csrc/cpu/jet.h, pgdfast/pde/chain.py).

    parameters: weight and bias (or None) of every layer in turn. forms: (number of the activation, scale) of every layer.
    Returns the last layer's stack, (N, C, out); or with `keep` all stacks from x on, and of every layer the coefficients of
    its derivatives, (N, C, out), or None for the identity.
    """
    stacks, coefficients, layers = [x], [], []
    for k, (kind, scale) in enumerate(forms):
        weight, last = parameters[2 * k], k == len(forms) - 1
        shape = x.shape[0], 1 + directions + len(weights), weight.shape[0]
        stacks.append(x.new_empty(shape) if keep or last else None)
        coefficients.append(x.new_empty(shape) if keep and kind != 0 else None)
        layers.append((weight, parameters[2 * k + 1], kind, scale, stacks[-1], coefficients[-1]))
    call = _C.jet_chain_float if x.dtype == torch.float32 else _C.jet_chain_double
    call(x, along, *x.shape, directions, [w for row in weights for w in row], layers)
    return (stacks, coefficients) if keep else stacks[-1]


def jet_adjoint(weights, directions, kept, y_bar) -> torch.Tensor:
    """The cotangent of what an activation in Taylor mode was applied to, (N, C, out)."""
    z_bar = torch.empty_like(y_bar)
    call = _C.jet_adjoint_float if y_bar.dtype == torch.float32 else _C.jet_adjoint_double
    call(y_bar.shape[0], y_bar.shape[2], directions, [w for row in weights for w in row], kept, y_bar, z_bar)
    return z_bar


class NativeFactor:
    """A factor in the core (kernels.protocol.Factor)."""

    __slots__ = ("_dtype", "_held")

    def __init__(self, held, dtype: torch.dtype):
        self._held, self._dtype = held, dtype

    order = property(lambda self: self._held.order, doc="M or P.")
    is_dual = property(lambda self: self._held.is_dual, doc="True for the matrix of the residuals.")
    bytes = property(lambda self: self._held.bytes, doc="Memory held.")

    def solve(self, b: torch.Tensor) -> torch.Tensor:
        """See kernels.protocol.Factor."""
        given = b.to(self._dtype).contiguous()
        x = torch.empty_like(given)
        self._held.solve(given, x)
        return x.to(b.dtype)

    @property
    def dual_vector(self) -> torch.Tensor:
        """Y of the solve, (M,)."""
        if not self.is_dual:
            raise ValueError("pgdfast: a factor of the primal matrix has no dual vector.")
        y = torch.empty(self.order, dtype=self._dtype)
        self._held.dual_vector(y)
        return y

    @dual_vector.setter
    def dual_vector(self, y: torch.Tensor) -> None:
        self._held.set_dual_vector(y.to(self._dtype).contiguous())


class Kernels(Traits):
    """A program's plan (kernels.protocol.Kernels). Results are of `dtype`, which may be wider than the constants'.

    Threads may share it: one call at a time works, others wait.
    """

    name = "native"
    fused = has_direct = batches = has_cg = has_lsmr = has_multishift = solves_members = has_columns = True
    scales_rows = adds_normal = True

    def __init__(self, program, dtype: torch.dtype):
        plan = _C.PlanFloat if dtype == torch.float32 else _C.PlanDouble
        self._plan = plan(*encoded(program), program.layouts, program.function_numbers())
        self.dtype = dtype
        self.num_residuals = self._plan.num_residuals
        self.num_parameters = self._plan.num_parameters
        self.flops, self.arena_size = self._plan.flops, self._plan.arena_size
        self._constants = None
        self._sizes = [size for role, size in program.buffers if role == 0]
        self._unit_weights = torch.ones(len(self._sizes), dtype=self.dtype)

    def bind(self, constants: list, row_scale: torch.Tensor | None = None) -> None:
        """Point the plan at these constants, which it keeps alive; J is diag(row_scale) J from then on."""
        if row_scale is not None:
            row_scale = row_scale.detach().to(self.dtype).contiguous()
        if not self._plan.bind(constants, row_scale):
            raise RuntimeError("pgdfast: a tape of known structure holds tensors of another layout; please report this.")
        self._constants = constants, row_scale

    def release(self) -> None:
        """Forget the constants; bind others before the next product."""
        self._constants = None

    def set_members(self, count: int, shifts: list[int], spans: list[int]) -> None:
        """Say that constants are those of `count` members: see tape.members.Members."""
        self._plan.set_members(count, shifts, spans)

    def select(self, member: int) -> None:
        """Let products and solves be those of one member."""
        self._plan.select(member)

    def set_rows(self, rows) -> None:
        """Give the plan the row structure that Gram and dense forms need, or take it away with None."""
        if rows is None:
            self._plan.clear_rows()
        else:
            self._plan.set_rows(encoded_rows(rows))

    @property
    def rows_of_parts(self) -> list[int]:
        """Into how many rows each independent part of the program can be cut for its sweeps; 1: it cannot."""
        return self._plan.rows_of_parts

    @property
    def sums_outputs(self) -> bool:
        """Whether J^T J comes from factors summed over the outputs of a row, without J; known once there are rows."""
        return self._plan.normal_pays

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v, (M,)."""
        u = self._new(self.num_residuals)
        self._plan.jvp(v, u)
        return u

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J^T u, (P,); of u (K, M): (K, P), in parallel."""
        if u.dim() == 2:
            v = self._new(len(u), self.num_parameters)
            self._plan.vjps(u.contiguous(), len(u), v)
            return v
        v = self._new(self.num_parameters)
        self._plan.vjp(u, v)
        return v

    def dense(self) -> torch.Tensor:
        """J, (M, P)."""
        J = self._new(self.num_residuals, self.num_parameters)
        self._plan.dense(J)
        return J

    def gram(self, weights: list[float] | None = None) -> torch.Tensor:
        """J W J^T, (M, M), W one number per parameter or None; needs rows."""
        K = self._new(self.num_residuals, self.num_residuals)
        self._plan.gram(self._unit_weights if weights is None else torch.tensor(weights, dtype=self.dtype), K)
        return K

    def columns(self, parameters: list[int]) -> torch.Tensor:
        """The columns of J of these parameter tensors, (M, their elements); needs rows."""
        J = self._new(self.num_residuals, sum(self._sizes[p] for p in parameters))
        self._plan.columns(parameters, J)
        return J

    def squared(self, A: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """A A^T, or A^T A, of any matrix."""
        n = A.shape[1 if transposed else 0]
        K = self._new(n, n)
        self._plan.squared(A.contiguous(), *A.shape, transposed, K)
        return K

    def add_normal(self, H: torch.Tensor) -> None:
        """Add J^T J to the upper triangle of a matrix of `normal_matrix`; no more than 64 MiB of J are there at once."""
        self._plan.add_normal(H)

    @property
    def packs(self) -> bool:
        """Whether there are rows, which `pack` needs."""
        return self._plan.has_rows

    @property
    def gram_order(self) -> list[int]:
        """Of every residual its row in `gram_rows`: the positions of `factor`; needs rows."""
        return self._plan.gram_order()

    def pack(self) -> Packed:
        """The factors of all rows of J, for Gram matrices with the rows of other parts; needs rows. Cost: unit sweeps."""
        return Packed(self._plan.pack(), self.dtype)

    def diagonal(self) -> torch.Tensor:
        """diag(J^T J), (P,)."""
        d = self._new(self.num_parameters)
        self._plan.diagonal(d)
        return d

    def dual(self, r, weights, shift, q) -> Outcome:
        """The dual step in one call; needs rows."""
        step = torch.empty(self.num_parameters, dtype=self.dtype)
        weights = self._unit_weights if weights is None else weights
        status, *numbers, factor = self._plan.dual(r, weights, shift, q, step)
        return Outcome(step, STATUS[status], *numbers, factor and NativeFactor(factor, self.dtype))

    def primal(self, r, d, q) -> Outcome:
        """The primal step in one call."""
        step = torch.empty(self.num_parameters, dtype=self.dtype)
        status, *numbers, factor = self._plan.primal(r, d, q, step)
        return Outcome(step, STATUS[status], *numbers, factor and NativeFactor(factor, self.dtype))

    def cg(self, r, d, q, preconditioner, start, path, options):
        """A whole CG solve in one call."""
        step = self._new(self.num_parameters)
        (status, *rest), kept = self._plan.cg(
            r, d, q, *preconditioner, start, path, options.max_iterations, options.tolerance, options.absolute,
            options.progress, step,
        )
        return Outcome(step, STATUS[status], *rest), kept

    def members_solve(self, name, listed, r, mu, penalty, scale, q, options, inverse=None, start=None):
        """Whole solves for the members listed in one call."""
        new = torch.empty if len(listed) == len(r) else torch.zeros
        steps = new(len(r), self.num_parameters, dtype=self.dtype)
        out = torch.empty(len(listed), _TABLE["kOutcomeNumbers"], dtype=torch.float64)
        if name == "dual":
            self._plan.members_dual(listed, r, mu, penalty, q, steps, out)
        elif name == "primal":
            self._plan.members_primal(listed, r, mu, penalty, scale, q, steps, out)
        else:
            self._plan.members_cg(
                listed, r, mu, penalty, scale, q, inverse, start, options.max_iterations, options.tolerance, options.absolute,
                options.progress, steps, out,
            )
        return steps, [(STATUS[int(status)], int(iterations), *rest) for status, iterations, *rest in out.tolist()]

    def multishift(self, r, q, mus, scale, penalty, options):
        """CG for all of the ascending mus from one Krylov space: steps (K, P), and per mu the rest of what `dual` returns.

        "stagnated" is a step whose true residual missed what its recurrence claimed.
        """
        steps = self._new(len(mus), self.num_parameters)
        found = self._plan.multishift(
            r, q, mus, scale, penalty, options.max_iterations, options.tolerance, options.absolute, steps
        )
        return steps, [(STATUS[status], *rest) for status, *rest in found]

    def lsmr(self, r, d, root, damp, q, max_iterations, tolerance):
        """A whole LSMR solve in one call."""
        step = self._new(self.num_parameters)
        status, *rest = self._plan.lsmr(r, d, root, damp, q, max_iterations, tolerance, step)
        return Outcome(step, STATUS[status], *rest)


def normal_matrix(order: int, dtype: torch.dtype) -> torch.Tensor:
    """A zero matrix for sums of J^T J or J J^T of this order n, (n + 1, more than n) as the core needs it, contiguous.

    Its upper triangle is what counts: what is left of the diagonal, behind column n and in the last row is not defined.
    """
    return torch.zeros(order + 1, _of(dtype, "gram_stride")(order), dtype=dtype)


gram_matrix = normal_matrix   # no other needs


def symmetric(H: torch.Tensor) -> torch.Tensor:
    """The whole symmetric matrix, (n, n), a copy, of one of `normal_matrix` or `gram_matrix`."""
    upper = H[: len(H) - 1, : len(H) - 1].triu()
    return upper + upper.triu(1).T


class Packed:
    """The factors of all rows of J of one part, packed; independent of the kernels that made it.

    `tensor` and `header` are all there is of it: another process makes the same of them by `packed`.
    """

    __slots__ = ("_held", "dtype")

    def __init__(self, held, dtype: torch.dtype):
        self._held, self.dtype = held, dtype

    num_residuals = property(lambda self: self._held.num_residuals, doc="M.")

    def tensor(self) -> torch.Tensor:
        """All numbers, one-dimensional, in shared memory: not to be changed."""
        return self._held.tensor()

    def header(self) -> list[int]:
        """What describes them."""
        return self._held.header()


def packed(header: list[int], tensor: torch.Tensor) -> Packed:
    """The Packed of a header and its numbers, which are kept.

    Raises RuntimeError where they do not belong together, or were packed on a machine of another instruction set.
    """
    return Packed(_of(tensor.dtype, "packed")(header, tensor), tensor.dtype)


def gram_rows(
    a: Packed, b: Packed, first: int, last: int, K: torch.Tensor, row: int, column: int, weights: list[float] | None = None
) -> None:
    """Write rows first .. last - 1 of J_a W J_b^T to K, (rows, ld), at (row, column).

    W: one number per parameter, or None for ones. Rows and columns are in the parts' gram_order. Where a is b only what is on
    the diagonal or right of it is defined. Cost: M_b (m + k) a row and weight of m x k elements.
    """
    if a.dtype != b.dtype:
        raise ValueError(f"pgdfast: packed factors of {a.dtype} and of {b.dtype}; pack both in one dtype.")
    weights = None if weights is None else torch.tensor(weights, dtype=a.dtype)
    _of(a.dtype, "gram_rows")(a._held, b._held, first, last, weights, K, row, column)


def factor(H: torch.Tensor, added, positions=None) -> tuple[NativeFactor | None, float]:
    """(The Cholesky factor of H + diag(added), None where that is not positive definite; the trace of H diag(added)^-1).

    H: of `normal_matrix` or `gram_matrix`, order n, not changed. added: a number or (n,), positive. positions: of a dual matrix
    where each residual stands in it; `solve` and the dual vector are then in the residuals' order. Cost: n^3 / 3, and half the
    memory of H.
    """
    n = len(H) - 1
    added = torch.as_tensor(added, dtype=torch.float64).expand(n).contiguous()
    held, trace = _of(H.dtype, "factor")(H, n, added, positions)
    return held and NativeFactor(held, H.dtype), trace


def _of(dtype: torch.dtype, name: str):
    return getattr(_C, name + ("_float" if dtype == torch.float32 else "_double"))
