"""The parts of a step, products with J, and the floors below them: PyTorch's own matrix products and Cholesky."""

from itertools import cycle

import torch

import pgdfast
from pgdfast.linear import Linearizer

from .interleave import Row, difference
from .problems import as_loss

FEW, MANY = 2, 8   # iterations of the two CG solves whose difference gives the length of one

CLOSURE, GRADIENT, READ, WALK, SOLVE = "closure", "gradient", "closure, tape read", "tape walk", "solve"
JVP, VJP, GGN, GRAM, CG = "J v", "J^T u", "J^T J v", "J J^T", "CG iteration"
CHOLESKY, GEMMS, GRAM_GEMM, GEMM = "Cholesky", "GEMMs of J^T J v", "GEMM of J J^T", "GEMM 512"
TAYLOR, NESTED, NESTED_STEP = "laplacian", "nested autograd", "LM step, nested autograd"
SINGLES = "LM step, one by one"
_LESS, _MORE = f"CG, {FEW} iterations", f"CG, {MANY} iterations"


def names(problem):
    """The rows of a problem's parts, in order."""
    dual, exact = problem.solver == "dual", problem.solver != "cg"
    wanted = {SOLVE: exact, GRAM: dual, CHOLESKY: exact, GEMMS: problem.products,
              GRAM_GEMM: problem.products and dual and problem.widths[-1] > 1 and problem.mean}
    everything = (CLOSURE, GRADIENT, READ, WALK, SOLVE, JVP, VJP, GGN, GRAM, CG, CHOLESKY, GEMMS, GRAM_GEMM, GEMM)
    return [name for name in everything if wanted.get(name, True)]


def linearized(problem, model):
    """The problem linearized at the model's parameters."""
    return pgdfast.linearize(problem.closure(model), list(model.parameters()))


def rows(problem):
    """The rows to be timed; `finish` puts the CG iteration in place of its two solves."""
    model = problem.model()
    closure, params = problem.closure(model), list(model.parameters())
    linearizer = Linearizer(params)
    # Two linearizations of one structure in turn: what the core keeps of one is not there for the next.
    pair = cycle([linearizer(closure), linearizer(closure)])
    lin = linearized(problem, model)
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(lin.num_parameters, generator=generator)
    u = torch.randn(lin.num_residuals, generator=generator)
    result = closure()
    results = list(result) if isinstance(result, tuple) else [result]
    walk = Linearizer(params).tracer._walker.walk
    walk(results)

    def gradient():
        for p in params:
            p.grad = None
        as_loss(closure()).backward()

    def cg(iterations):
        # A damping so small that no problem converges within MANY iterations.
        found = pgdfast.solve(lin, 1e-4 * problem.damping, solver="cg", cg=pgdfast.CG(iterations, 1e-6))
        if found.iterations != iterations:
            raise ArithmeticError(f"{problem.name}: CG stopped after {found.iterations} of {iterations} iterations")

    sweep = problem.sweep_flops if problem.products else None
    gram = problem.gram_flops if problem.products else None
    calls = {
        CLOSURE: (closure, None),
        GRADIENT: (gradient, None),
        READ: (lambda: linearizer(closure).kernels(), None),   # a tape that was read once is read faster
        WALK: (lambda: walk(results), None),
        SOLVE: (lambda: pgdfast.solve(next(pair), problem.damping, solver=problem.solver),
                problem.step_flops if problem.products else None),
        JVP: (lambda: lin.jvp(v), sweep),
        VJP: (lambda: lin.vjp(u), sweep),
        GGN: (lambda: lin.ggn(v), sweep and 2 * sweep),
        GRAM: (lambda: next(pair).gram(), gram),
        _LESS: (lambda: cg(FEW), None),
        _MORE: (lambda: cg(MANY), None),
    }
    kept = [*(set(names(problem)) & set(calls)), _LESS, _MORE]
    return [Row(name, call, flops=flops) for name, (call, flops) in calls.items() if name in kept] + floors(problem)


def finish(problem, timings):
    """The timings of `rows`, with the CG iteration in place."""
    less, more = timings.pop(_LESS), timings.pop(_MORE)
    flops = 2 * problem.sweep_flops if problem.products else None
    timings[CG] = difference(CG, less, more, MANY - FEW, flops)
    first = [name for name in timings if name not in names(problem)]
    return {name: timings[name] for name in [*first, *names(problem)]}


def floors(problem):
    """PyTorch alone, without what leads up to it: a Cholesky of the step's order, the GEMMs, and one large GEMM."""
    generator = torch.Generator().manual_seed(4)
    found = {}
    wanted = names(problem)
    if CHOLESKY in wanted:
        matrix = definite(problem.order, generator)
        found[CHOLESKY] = (lambda: torch.linalg.cholesky_ex(matrix), problem.cholesky_flops)
    if GEMMS in wanted:
        found[GEMMS] = (products(problem.sweep_shapes(), generator), 2 * problem.sweep_flops)
    if GRAM_GEMM in wanted:
        M, K = problem.gram_shape()
        found[GRAM_GEMM] = (half_square(M, K, generator), M * M * K)
    n = 512
    left, right, product = (torch.randn(n, n, generator=generator) for _ in range(3))
    found[GEMM] = (lambda: torch.mm(left, right, out=product), 2 * n**3)
    return [Row(name, call, flops=flops) for name, (call, flops) in found.items()]


def definite(n, generator):
    """A symmetric positive definite (n, n)."""
    wide = torch.randn(n, 64, generator=generator)
    matrix = wide @ wide.T
    matrix.diagonal().add_(64.0)
    return matrix


def products(shapes, generator):
    """A call that runs torch.mm for each (m, k, n), on operands of its own."""
    operands = [(torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator), torch.empty(m, n))
                for m, k, n in shapes]

    def call():
        for left, right, product in operands:
            torch.mm(left, right, out=product)

    return call


def half_square(M, K, generator, width=250):
    """A call that runs the upper half of Y Y^T, Y (M, K), in panels of `width` rows."""
    Y, product = torch.randn(M, K, generator=generator), torch.empty(M, M)
    panels = [(Y[j:j + width], Y[j:].T, product[j:j + width, j:]) for j in range(0, M, width)]

    def call():
        for left, right, panel in panels:
            torch.mm(left, right, out=panel)

    return call
