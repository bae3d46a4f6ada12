"""One problem: all its rows made, checked against float64, and timed in turn."""

import torch

from . import parts
from .interleave import ROW_SECONDS, Row, interleaved
from .peers import LM, Adam, FusedAdam, Missing, PyPose, TorchFunc, TorchLevenbergMarquardt, TorchLevenbergMarquardtAsShipped
from .peers_jax import Jax, JaxProduct, Optimistix
from .products import CompiledCurvlinops, Curvlinops, TorchFuncProduct
from .tables import Measured
from .truth import Truth, relative_error

CONTENDERS = (LM, Adam, FusedAdam, TorchLevenbergMarquardt, TorchLevenbergMarquardtAsShipped, PyPose, TorchFunc, Jax,
              Optimistix)
PRODUCTS = (TorchFuncProduct, Curvlinops, CompiledCurvlinops, JaxProduct)
SLOWEST = {(Optimistix.name, "A"), (PyPose.name, "A"), (TorchFunc.name, "D"), (TorchFunc.name, "G")}   # not in a quick run

ALLOWED = 1e-4                        # relative error of our steps, ...
FLOAT32 = 2**-24                      # ... and of the peers' too, but for eps times the condition
ALLOWED_PRODUCT = 1e-5                # relative error of J^T J v


def on(problem, kinds, quick):
    """The contenders that are timed on a problem."""
    return [kind for kind in kinds if problem.name in kind.problems and not (quick and (kind.name, problem.name) in SLOWEST)]


def measure(problem, rounds, quick=False):
    """Every row of a problem, as Measured."""
    truth = Truth(problem)
    rows, missing, errors = step_rows(problem, on(problem, CONTENDERS, quick), truth)
    more, absent, wrong = product_rows(problem, on(problem, PRODUCTS, quick), truth)
    errors[parts.GGN] = own_product_error(problem, truth)
    del truth   # D's and G's peers need its memory
    timings = parts.finish(problem, interleaved(rows + more + parts.rows(problem), rounds, 0.5 if quick else ROW_SECONDS))
    title = (f"{problem.name}: {problem.described}; {problem.residuals} residuals, {problem.parameters} parameters, "
             f"{problem.solver}, damping {problem.damping:g}")
    against = tuple(kind.name for kind in PRODUCTS) + (parts.JVP, parts.VJP, parts.GGN, parts.CG, parts.GEMMS)
    facts = {"residuals": problem.residuals, "parameters": problem.parameters, "damping": problem.damping,
             "solver": problem.solver}
    return Measured(title, timings, missing | absent, errors | wrong, against, facts)


def step_rows(problem, kinds, truth=None):
    """(rows, why some are missing, {name: (error, allowed)}): every batch of steps starts from the same parameters."""
    rows, missing, errors, expected = [], {}, {}, {}
    for kind in kinds:
        try:
            made = kind(problem)
            if made.exact and truth is not None:
                if made.exact not in expected:
                    expected[made.exact] = truth.step(made.exact)
                step, condition = expected[made.exact]
                allowed = ALLOWED if kind is LM else max(ALLOWED, FLOAT32 * condition)
                errors[kind.name] = relative_error(kind(problem, lr=1.0).taken(), step), allowed
        except Missing as reason:
            missing[kind.name] = str(reason)
            continue
        flops = problem.step_flops if made.exact and problem.products else None
        rows.append(Row(kind.name, made.step, made.reset, flops, made.threads))
    return rows, missing, errors


def product_rows(problem, kinds, truth=None):
    """The same for J^T J v."""
    rows, missing, errors = [], {}, {}
    v = vector(problem)
    expected = truth.product(v) if truth is not None and kinds else None
    for kind in kinds:
        try:
            made = kind(problem, v)
            if truth is not None:
                errors[kind.name] = relative_error(made.value(), expected), ALLOWED_PRODUCT
        except Missing as reason:
            missing[kind.name] = str(reason)
            continue
        flops = 2 * problem.sweep_flops if problem.products else None
        rows.append(Row(kind.name, made, flops=flops, threads=made.threads, share=made.share))
    return rows, missing, errors


def own_product_error(problem, truth):
    """(relative error, allowed) of Linearization.ggn."""
    v, model = vector(problem), problem.model()
    return relative_error(parts.linearized(problem, model).ggn(v), truth.product(v)), ALLOWED_PRODUCT


def vector(problem):
    return torch.randn(problem.parameters, generator=torch.Generator().manual_seed(5))
