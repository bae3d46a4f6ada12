"""The fast backends against the reference: on a problem of each task, at several points along training.

What is compared at a point, each as a relative error in the Euclidean (Frobenius) norm against the explicit float64
Jacobian of `pgdfast.reference`: the residual r, the gradient J^T r, J v and J^T u for random v and u, the Gram matrix
J J^T, and the damped step of every solver that applies. Then both train from the same weights, and their losses are
compared step by step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType

import torch

import pgdfast

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative error allowed of anything compared at one point."""
CURVE_BOUND, CURVE_STEPS = 1e-6, 20
"""Largest relative distance of two losses, over that many float64 steps."""
CONDITION = 1e6
"""Steps in float32 are bounded where mu I + J^T J is conditioned no worse than this."""
POINTS = (0, 3, 8)
"""Steps of reference training after which the backends are compared."""

_CG = {torch.float64: pgdfast.CG(20000, 1e-14), torch.float32: pgdfast.CG(5000, 1e-10)}


@dataclass(frozen=True)
class Problem:
    """A closure over a model's parameters.

    Attributes:
        model: its parameters are the optimizer's.
        closure: what LM.step takes; full batch.
        options: of pgdfast.LM besides solver and backend (damping, lr, ...); the damping rule is "constant".
        solvers: those that apply, of "dual", "primal", "cg", "eigh".
        size: one line on what was made smaller than the task's own, and on the numbers of residuals and parameters.

    """

    model: torch.nn.Module
    closure: Callable
    options: dict
    solvers: tuple[str, ...]
    size: str


@dataclass
class Comparison:
    """One problem in one precision: the largest relative error of each quantity over the points.

    errors: by quantity ("residual", "gradient", "J v", "J^T u", "Gram", "step dual", ...). condition: the largest of
    mu I + J^T J at the points. unbounded: quantities that are shown but not judged (steps beyond CONDITION in float32).
    """

    dtype: torch.dtype
    errors: dict = field(default_factory=dict)
    condition: float = 0.0
    unbounded: set = field(default_factory=set)

    def note(self, quantity, error, bounded=True):
        """Keep the larger of two errors; a number that is no number counts as infinite."""
        error = error if error == error else float("inf")
        self.errors[quantity] = max(self.errors.get(quantity, 0.0), error)
        if not bounded:
            self.unbounded.add(quantity)

    def violations(self):
        """Return the (quantity, error, bound) of everything that exceeds its bound."""
        bound = BOUNDS[self.dtype]
        return [(name, error, bound) for name, error in self.errors.items()
                if error > bound and name not in self.unbounded]


def on_device(problem, device):
    """Move a problem's model and the tensors that its closure holds to a device; return the problem."""
    problem.model.to(device)
    _move(problem.closure, device, {})
    return problem


def _move(function, device, moved):
    """Put what a nested function's variables hold onto a device; moved: {id: (tensor, its copy)}, so that one stays one."""
    if id(function) in moved:
        return
    moved[id(function)] = function, function
    for cell in function.__closure__ or ():
        cell.cell_contents = _moved(cell.cell_contents, device, moved)


def _moved(value, device, moved):
    if isinstance(value, torch.Tensor):
        if id(value) not in moved:
            copy = value if isinstance(value, torch.nn.Parameter) else value.detach().to(device)
            moved[id(value)] = value, copy.requires_grad_(value.requires_grad)
            moved[id(copy)] = copy, copy   # two functions may share a variable
        return moved[id(value)][1]
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_moved(item, device, moved) for item in value)
    if isinstance(value, torch.nn.Module):
        return value.to(device)
    if isinstance(value, FunctionType):
        _move(value, device, moved)
    return value


def compare(make, dtype, backend, seed=0):
    """Compare a backend with the reference on a problem.

    Args:
        make: function of (dtype, seed) returning a `Problem`.
        dtype: torch.float64 or torch.float32.
        backend: "auto", "native", "torch".
        seed: of the weights and of the random vectors.

    Returns:
        A `Comparison`. The reference runs in float64 in either case.

    """
    problem = make(dtype, seed)
    params = list(problem.model.parameters())
    trainer = _optimizer(problem, backend="reference", solver="auto")
    result = Comparison(dtype)
    for step in range(max(POINTS) + 1):
        if step in POINTS:
            _compare_here(problem, params, backend, seed + step, result)
        if step < max(POINTS):
            trainer.step(problem.closure)
    return result


def _compare_here(problem, params, backend, seed, result):
    lin = pgdfast.linearize(problem.closure, params, backend=backend)
    ref = pgdfast.reference.linearize(problem.closure, params)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(ref.num_parameters, generator=generator, dtype=torch.float64).to(lin.device)
    u = torch.randn(ref.num_residuals, generator=generator, dtype=torch.float64).to(lin.device)
    result.note("residual", _relative(lin.residual, ref.residual))
    result.note("gradient", _relative(lin.gradient(), ref.vjp(ref.residual)))
    result.note("J v", _relative(lin.jvp(v), ref.jvp(v)))
    result.note("J^T u", _relative(lin.vjp(u), ref.vjp(u)))
    gram = ref.gram()
    result.note("Gram", _relative(lin.gram(), gram))

    mu = problem.options["damping"]
    largest, least = _extremes(gram, ref)
    condition = (largest + mu) / (least + mu)
    result.condition = max(result.condition, condition)
    bounded = lin.dtype == torch.float64 or condition <= CONDITION
    expected = pgdfast.reference.solve(ref, mu).step
    for solver in problem.solvers:
        step = pgdfast.solve(lin, mu, solver=solver, cg=_CG[lin.dtype]).step
        result.note(f"step {solver}", _relative(step, expected), bounded)


def _extremes(gram, ref):
    """Return the largest and the least eigenvalue of J^T J (P x P), from the smaller of the two products."""
    if ref.num_residuals < ref.num_parameters:
        return float(torch.linalg.eigvalsh(gram)[-1]), 0.0
    values = torch.linalg.eigvalsh(ref.dense().T @ ref.dense())
    return float(values[-1]), max(float(values[0]), 0.0)


def curve_distance(make, backend, solver, steps=CURVE_STEPS, seed=0):
    """Return the largest relative distance of the losses of a backend and of the reference over float64 training."""
    curves = []
    for name in (backend, "reference"):
        problem = make(torch.float64, seed)
        optimizer = _optimizer(problem, backend=name, solver=solver)
        losses = [float(optimizer.step(problem.closure)) for _ in range(steps)]
        curves.append(torch.tensor(losses, dtype=torch.float64))
    fast, slow = curves
    distance = float(((fast - slow).abs() / slow.abs()).max())
    return distance if distance == distance else float("inf")


def _optimizer(problem, backend, solver):
    return pgdfast.LM(problem.model.parameters(), damping_rule="constant", backend=backend, solver=solver,
                      cg=_CG[torch.float64], **problem.options)


def _relative(a, b):
    norm = float(b.norm())
    return float((a.detach().double() - b).norm()) / (norm or 1.0)
